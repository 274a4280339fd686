//! What a lease granted.
//!
//! A lease of hundreds of blocks is asked for in microseconds, and most of what is known of each block is wanted of few of them,
//! or of none. Packed answers are kept as they came: runs of blocks are looked at as a whole, and a block when it is asked for.

use bytes::Bytes;

use terrace_core::{BlockId, HEADER_PAGE_BYTES};
use terrace_lane::{PACKED_GRANT_BYTES, PackedGrant};
use terrace_proto::BLOCKS_PER_REQUEST_MAX;
use terrace_proto::v1::lane_response::Result as Answer;
use terrace_proto::v1::{BlockGrant, GrantOutcome, LaneResponse, MissReason, PackedGrants};

pub(crate) const BLOCK_ID_BYTES: usize = 16;

/// What became of one block of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) outcome: GrantOutcome,
    pub(crate) reason: MissReason,
    pub(crate) chunk: u64,
    pub(crate) frame: u32,
    pub(crate) offset: u64,
    pub(crate) fence: u64,
    pub(crate) length: u64,
    pub(crate) checksum: u64,
    /// `None`: none, or not of 16 bytes.
    pub(crate) block: Option<BlockId>,
}

impl Grant {
    /// Of a message without fields.
    pub(crate) const EMPTY: Self = Self {
        outcome: GrantOutcome::Unspecified,
        reason: MissReason::Unspecified,
        chunk: 0,
        frame: 0,
        offset: 0,
        fence: 0,
        length: 0,
        checksum: 0,
        block: None,
    };
}

impl From<&BlockGrant> for Grant {
    fn from(wire: &BlockGrant) -> Self {
        Self {
            outcome: wire.outcome(),
            reason: wire.reason(),
            chunk: wire.chunk,
            frame: wire.frame,
            offset: wire.offset,
            fence: wire.fence,
            length: wire.length,
            checksum: wire.checksum,
            block: wire.block_id[..].try_into().ok().map(BlockId::from_bytes),
        }
    }
}

/// What became of the blocks of a lease, in the order in which they were asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Grants {
    Each(Vec<Grant>),
    Packed(Packed),
}

/// As they came. Whatever their bytes say is a place behind a fence.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Packed {
    runs: Vec<Run>,
    /// Those that are granted.
    grants: Box<[[u8; PACKED_GRANT_BYTES]]>,
    fence: u64,
    length: u64,
    frame_bytes: u64,
    /// Of all blocks, or none at all.
    ids: Bytes,
}

/// Neighbours that are alike.
#[derive(Debug, PartialEq, Eq)]
struct Run {
    /// Where the blocks behind it begin.
    end: usize,
    /// Blocks before it that are not granted, and so are not packed.
    skipped: usize,
    outcome: GrantOutcome,
    reason: MissReason,
    chunk: u64,
}

/// Neighbours that are alike, but for where they lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alike {
    pub(crate) first: Grant,
    /// Where the blocks behind it begin.
    pub(crate) end: usize,
    /// Of the one that lies farthest in the chunk.
    pub(crate) offset_max: u64,
}

impl Default for Grants {
    fn default() -> Self {
        Self::Each(Vec::new())
    }
}

impl Grants {
    /// Takes them out of an answer. Where what is packed is not as it should be there are none: the lease then answers too few
    /// keys, and is refused.
    pub(crate) fn of(response: &mut LaneResponse) -> Self {
        let Some(Answer::Lease(leased)) = &mut response.result else { return Self::default() };
        match leased.packed.take() {
            Some(packed) => Self::packed(&packed).unwrap_or_default(),
            None => Self::Each(std::mem::take(&mut leased.blocks).iter().map(Grant::from).collect()),
        }
    }

    fn packed(packed: &PackedGrants) -> Option<Self> {
        let all = packed.grants.as_chunks::<PACKED_GRANT_BYTES>().0;
        let (mut runs, mut end, mut granted) = (Vec::with_capacity(packed.runs.len()), 0, 0);
        for run in &packed.runs {
            let skipped = end - granted;
            end += run.blocks as usize;
            if run.outcome() == GrantOutcome::Granted {
                granted += run.blocks as usize;
            }
            if end > BLOCKS_PER_REQUEST_MAX || granted > all.len() {
                return None;
            }
            let (outcome, reason, chunk) = (run.outcome(), run.reason(), run.chunk);
            runs.push(Run { end, skipped, outcome, reason, chunk });
        }
        // No frame and no fence is beyond what numbers hold.
        packed.frame_bytes.checked_mul(u32::MAX.into())?.checked_add(HEADER_PAGE_BYTES)?;
        packed.fence.checked_add(u32::MAX.into())?;
        let kept = Self::Packed(Packed {
            runs,
            grants: all[..granted].into(),
            fence: packed.fence,
            length: packed.length,
            frame_bytes: packed.frame_bytes,
            ids: Bytes::new(),
        });
        if packed.block_ids.is_empty() {
            return Some(kept);
        }
        // For who asked by keys: ids of those that are granted.
        let mut ids = packed.block_ids.as_chunks::<BLOCK_ID_BYTES>().0.iter();
        let named = kept.iter().map(|grant| match grant.outcome {
            GrantOutcome::Granted => Grant { block: ids.next().map(|id| BlockId::from_bytes(*id)), ..grant },
            _ => grant,
        });
        Some(Self::Each(named.collect()))
    }

    /// These are the ids that the blocks were asked for by, 16 bytes each, in order.
    pub(crate) fn name(&mut self, ids: Bytes) {
        match self {
            Self::Each(grants) => {
                for (grant, id) in grants.iter_mut().zip(ids.as_chunks::<BLOCK_ID_BYTES>().0) {
                    grant.block = Some(BlockId::from_bytes(*id));
                }
            }
            Self::Packed(packed) => packed.ids = ids,
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Each(grants) => grants.len(),
            Self::Packed(packed) => packed.runs.last().map_or(0, |run| run.end),
        }
    }

    /// What became of a block.
    ///
    /// # Panics
    /// If there is none at that position.
    #[inline]
    pub(crate) fn at(&self, at: usize) -> Grant {
        match self {
            Self::Each(grants) => grants[at],
            Self::Packed(packed) => packed.at(at, packed.run(at)),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Grant> {
        (0..self.len()).map(|at| self.at(at))
    }

    /// All of them, some at a time.
    pub(crate) fn alike(&self) -> impl Iterator<Item = Alike> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let alike = (at < self.len()).then(|| self.alike_from(at))?;
            at = alike.end;
            Some(alike)
        })
    }

    fn alike_from(&self, at: usize) -> Alike {
        match self {
            Self::Each(grants) => Alike { first: grants[at], end: at + 1, offset_max: grants[at].offset },
            Self::Packed(packed) => {
                let run = packed.run(at);
                let first = packed.at(at, run);
                let offset_max = match run.outcome {
                    GrantOutcome::Granted => {
                        let frames = packed.grants[at - run.skipped..run.end - run.skipped].iter();
                        let last = frames.map(|grant| PackedGrant::from_bytes(grant).frame).max();
                        packed.offset(last.unwrap_or(0))
                    }
                    _ => 0,
                };
                Alike { first, end: run.end, offset_max }
            }
        }
    }

    /// The daemon has dropped this chunk: what was granted there is missing.
    pub(crate) fn lose(&mut self, chunk: u64) {
        let lose = |outcome: &mut GrantOutcome, reason: &mut MissReason, of: u64| {
            if *outcome == GrantOutcome::Granted && of == chunk {
                (*outcome, *reason) = (GrantOutcome::Missing, MissReason::Unknown);
            }
        };
        match self {
            Self::Each(grants) => {
                grants.iter_mut().for_each(|one| lose(&mut one.outcome, &mut one.reason, one.chunk));
            }
            Self::Packed(packed) => {
                packed.runs.iter_mut().for_each(|run| lose(&mut run.outcome, &mut run.reason, run.chunk));
            }
        }
    }
}

impl Packed {
    #[inline]
    fn run(&self, at: usize) -> &Run {
        &self.runs[self.runs.partition_point(|run| run.end <= at)]
    }

    #[inline]
    fn offset(&self, frame: u32) -> u64 {
        u64::from(frame) * self.frame_bytes + HEADER_PAGE_BYTES
    }

    #[inline]
    fn at(&self, at: usize, run: &Run) -> Grant {
        if run.outcome != GrantOutcome::Granted {
            return Grant { outcome: run.outcome, reason: run.reason, ..Grant::EMPTY };
        }
        let one = PackedGrant::from_bytes(&self.grants[at - run.skipped]);
        Grant {
            outcome: run.outcome,
            reason: run.reason,
            chunk: run.chunk,
            frame: one.frame,
            offset: self.offset(one.frame),
            fence: self.fence + u64::from(one.fence),
            length: self.length,
            checksum: one.checksum,
            block: self.ids.as_chunks::<BLOCK_ID_BYTES>().0.get(at).map(|id| BlockId::from_bytes(*id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use terrace_lane::LaneMessage;
    use terrace_proto::v1::{LeaseResponse, PackedRun};

    use crate::keyed::Answered;

    use super::*;

    fn run(blocks: u32, outcome: GrantOutcome, chunk: u64) -> PackedRun {
        PackedRun { blocks, outcome: outcome.into(), reason: 1, chunk, ..Default::default() }
    }

    /// Of three blocks that are granted and three that are not.
    fn six() -> (PackedGrants, Vec<Grant>) {
        let grants = (0..3u8).map(|n| PackedGrant { checksum: 70 + u64::from(n), fence: n.into(), frame: 5 });
        let packed = PackedGrants {
            runs: vec![
                run(2, GrantOutcome::Granted, 300),
                run(3, GrantOutcome::Missing, 0),
                run(1, GrantOutcome::Granted, 400),
            ],
            grants: grants.flat_map(|grant| grant.to_bytes()).collect(),
            fence: 1 << 40,
            length: 4000,
            frame_bytes: 8192,
            block_ids: (0..3).flat_map(|n| [n; 16]).collect(),
        };
        let reason = MissReason::try_from(1).unwrap();
        let granted = |n: u8, chunk: u64| Grant {
            outcome: GrantOutcome::Granted,
            reason,
            chunk,
            frame: 5,
            offset: 5 * 8192 + 4096,
            fence: (1 << 40) + u64::from(n),
            length: 4000,
            checksum: 70 + u64::from(n),
            block: Some(BlockId::from_bytes([n; 16])),
        };
        let missing = Grant { outcome: GrantOutcome::Missing, reason, ..Grant::EMPTY };
        (packed, vec![granted(0, 300), granted(1, 300), missing, missing, missing, granted(2, 400)])
    }

    fn unpacked(packed: PackedGrants) -> Grants {
        let leased = LeaseResponse { lease: 3, packed: Some(packed), ..Default::default() };
        let answer = LaneResponse { id: 1, result: Some(Answer::Lease(leased)) };
        Answered::decode_frame(answer.encode_to_vec().into()).unwrap().grants
    }

    // A byte in another's place would be another block's frame.
    #[test]
    fn packed_blocks_are_what_the_daemon_granted() {
        let (packed, wanted) = six();
        assert_eq!(unpacked(packed.clone()).iter().collect::<Vec<_>>(), wanted);
        // Whoever asked by ids has none in the answer.
        let mut named = unpacked(PackedGrants { block_ids: Bytes::new(), ..packed });
        assert!(named.iter().all(|grant| grant.block.is_none()));
        named.name((0..6).flat_map(|n| [n; 16]).collect());
        let with_ids = (0..).zip(wanted).map(|(n, grant)| match grant.outcome {
            GrantOutcome::Granted => Grant { block: Some(BlockId::from_bytes([n; 16])), ..grant },
            _ => grant,
        });
        assert_eq!(named.iter().collect::<Vec<_>>(), with_ids.collect::<Vec<_>>());
    }

    // Who looks at many blocks at once must find none that he would not find one by one.
    #[test]
    fn runs_are_their_blocks() {
        let (packed, _) = six();
        let frames = [9, 2, 4].map(|frame| PackedGrant { checksum: 1, fence: 0, frame });
        let grants = frames.iter().flat_map(PackedGrant::to_bytes).collect();
        let empty = run(0, GrantOutcome::Granted, 7);
        let runs = packed.runs.iter().flat_map(|run| [empty, *run, empty]).collect();
        let packed = PackedGrants { block_ids: Bytes::new(), grants, runs, ..packed };
        let mut found = unpacked(packed);
        let one_by_one = Grants::Each(found.iter().collect());
        let outcomes = |grants: &Grants| {
            let alike = grants.alike();
            alike.map(|run| (run.end, run.first, run.offset_max)).collect::<Vec<_>>()
        };
        let runs = outcomes(&found);
        assert_eq!(runs.iter().map(|(end, ..)| *end).collect::<Vec<_>>(), [2, 5, 6]);
        assert_eq!(runs[0].2, 9 * 8192 + 4096);
        assert_eq!(outcomes(&one_by_one).len(), 6);
        found.lose(300);
        let left: Vec<_> = found.iter().map(|grant| grant.outcome == GrantOutcome::Granted).collect();
        assert_eq!(left, [false, false, false, false, false, true]);
        assert_eq!(found.at(5), one_by_one.at(5));
        let mut one_by_one = one_by_one;
        one_by_one.lose(300);
        let outcomes =
            |grants: &Grants| grants.iter().map(|grant| (grant.outcome, grant.reason)).collect::<Vec<_>>();
        assert_eq!(outcomes(&found), outcomes(&one_by_one));
    }

    // What a daemon sends may end anywhere and say anything: a block must not be found where none was granted.
    #[test]
    fn packed_blocks_that_lie_nowhere_are_none() {
        let (packed, wanted) = six();
        let whole = packed.grants.len();
        for length in 0..whole {
            let cut = PackedGrants { grants: packed.grants.slice(..length), ..packed.clone() };
            assert_eq!(unpacked(cut).len(), 0, "{length} bytes");
        }
        assert_eq!(unpacked(packed.clone()).len(), wanted.len());
        assert_eq!(unpacked(PackedGrants { frame_bytes: u64::MAX / 2, ..packed.clone() }).len(), 0);
        assert_eq!(unpacked(PackedGrants { fence: u64::MAX - 1, ..packed.clone() }).len(), 0);
        let many = vec![run(u32::MAX, GrantOutcome::Missing, 0); 3];
        assert_eq!(unpacked(PackedGrants { runs: many, ..packed }).len(), 0);
    }
}
