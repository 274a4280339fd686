//! The one answer that has hundreds of parts, encoded from what the core granted.
//!
//! By way of the generated messages each part would be built, measured twice and encoded: more work than to find and
//! pin the blocks. The bytes are those of the generated code.

use terrace_core::{ByteCount, Checksum, Grant, HEADER_PAGE_BYTES, LeaseId, Micros, frame_bytes};
use terrace_lane::{PACKED_GRANT_BYTES, PackedGrant};
use terrace_proto::v1;

use crate::convert;

/// Field numbers and wire types of `LaneResponse`, `LeaseResponse` and `BlockGrant`, as tags.
const ID: u8 = varint(1);
const LEASE: u8 = length(6);
const LEASE_ID: u8 = varint(1);
const LEASE_TTL: u8 = varint(2);
const LEASE_BLOCKS: u8 = length(3);
const LEASE_GENERATION: u8 = varint(4);
const OUTCOME: u8 = varint(1);
const REASON: u8 = varint(2);
const CHUNK: u8 = varint(3);
const FRAME: u8 = varint(4);
const OFFSET: u8 = varint(5);
const FENCE: u8 = varint(6);
const LENGTH: u8 = varint(7);
const CHECKSUM: u8 = varint(8);
const BLOCK_ID: u8 = length(9);
const TIER: u8 = varint(10);
const DEVICE: u8 = varint(11);

/// Outcome and reason of 1 byte, five numbers of 64 bits, two of 32, an id, a tier of 1 byte, and their tags: less than
/// 128, so that its length is one byte.
const GRANT_BYTES_MAX: usize = 2 * 2 + 5 * 11 + 2 * 6 + 18 + 2;
const _: () = assert!(GRANT_BYTES_MAX < 128);

const fn varint(field: u8) -> u8 {
    field << 3
}

const fn length(field: u8) -> u8 {
    field << 3 | 2
}

/// What became of a lease.
pub(crate) struct Leased<'a> {
    pub(crate) lease: Option<LeaseId>,
    pub(crate) ttl: Micros,
    pub(crate) generation: u64,
    pub(crate) grants: &'a [Grant],
}

/// A `LaneResponse` that answers request `id`.
pub(crate) fn leased(id: u64, leased: &Leased<'_>) -> Vec<u8> {
    let mut body = Vec::with_capacity(leased.grants.len() * (2 + GRANT_BYTES_MAX) + 40);
    let mut fields = Fields::default();
    fields.number(LEASE_ID, leased.lease.map_or(0, LeaseId::get));
    fields.number(LEASE_TTL, leased.ttl.millis());
    body.extend_from_slice(fields.bytes());
    for one in leased.grants {
        let mut fields = Fields::default();
        grant(&mut fields, one);
        let length = u8::try_from(fields.length).expect("a grant takes less than 128 bytes");
        body.extend_from_slice(&[LEASE_BLOCKS, length]);
        body.extend_from_slice(fields.bytes());
    }
    let mut fields = Fields::default();
    fields.number(LEASE_GENERATION, leased.generation);
    body.extend_from_slice(fields.bytes());
    let mut head = Fields::default();
    head.number(ID, id);
    head.push(&[LEASE]);
    head.value(body.len() as u64);
    let mut message = Vec::with_capacity(head.length + body.len());
    message.extend_from_slice(head.bytes());
    message.extend_from_slice(&body);
    message
}

/// The answer to whoever reads packed grants, with the blocks' ids if he does not know them; `None` if these cannot be packed,
/// or have too little in common to be.
pub(crate) fn packed(leased: &Leased<'_>, with_ids: bool) -> Option<v1::LeaseResponse> {
    let granted = |grant: &Grant| match grant {
        Grant::Granted { fence, length, .. } => Some((fence.get(), *length)),
        Grant::Promoting | Grant::Missing(_) | Grant::Throttled | Grant::Exists => None,
    };
    let fence = leased.grants.iter().filter_map(granted).map(|(fence, _)| fence).min().unwrap_or(0);
    // Payload and frame of the first, which must be those of all.
    let all = leased.grants.iter().find_map(granted).map_or(ByteCount::new(0), |(_, length)| length);
    let frame_bytes = frame_bytes(all)?.get();
    let count = leased.grants.len();
    let mut grants = Vec::with_capacity(count * PACKED_GRANT_BYTES);
    let mut block_ids = Vec::with_capacity(if with_ids { count * 16 } else { 0 });
    // Each is a message, which takes as long as a block's.
    let (mut runs, runs_max) = (Vec::<v1::PackedRun>::new(), 16 + count / 8);
    // What the last run's blocks have in common.
    let mut before = None;
    for grant in leased.grants {
        let (outcome, reason) = convert::outcome(grant);
        let mut place = None;
        if let Grant::Granted { block, frame, fence: own, offset, length, checksum, memory } = grant {
            let at = u64::from(frame.index).checked_mul(frame_bytes)?.checked_add(HEADER_PAGE_BYTES)?;
            if all != *length || at != *offset {
                return None;
            }
            let one = PackedGrant {
                checksum: checksum.map_or(0, Checksum::get),
                fence: u32::try_from(own.get() - fence).ok()?,
                frame: frame.index,
            };
            grants.extend_from_slice(&one.to_bytes());
            if with_ids {
                block_ids.extend_from_slice(&block.to_bytes());
            }
            place = Some((frame.chunk, *memory));
        }
        let alike = Some((outcome, reason, place));
        let is_full = runs.len() == runs_max;
        match runs.last_mut() {
            Some(last) if before == alike => last.blocks += 1,
            Some(_) if is_full => return None,
            Some(_) | None => {
                let mut run = v1::PackedRun {
                    blocks: 1,
                    outcome: outcome.into(),
                    reason: reason.into(),
                    ..Default::default()
                };
                if let Some((chunk, memory)) = place {
                    let (tier, device) = convert::memory(memory);
                    (run.chunk, run.tier, run.device) = (chunk.get(), tier.into(), device);
                }
                runs.push(run);
            }
        }
        before = alike;
    }
    Some(v1::LeaseResponse {
        lease: leased.lease.map_or(0, LeaseId::get),
        ttl_ms: leased.ttl.millis(),
        blocks: Vec::new(),
        generation: leased.generation,
        packed: Some(v1::PackedGrants {
            runs,
            grants: grants.into(),
            fence,
            length: all.get(),
            frame_bytes,
            block_ids: block_ids.into(),
        }),
    })
}

fn grant(fields: &mut Fields, grant: &Grant) {
    let (outcome, reason) = convert::outcome(grant);
    fields.small(OUTCOME, outcome as i32);
    fields.small(REASON, reason as i32);
    match grant {
        Grant::Granted { block, frame, fence, offset, length, checksum, memory } => {
            fields.number(CHUNK, frame.chunk.get());
            fields.number(FRAME, frame.index.into());
            fields.number(OFFSET, *offset);
            fields.number(FENCE, fence.get());
            fields.number(LENGTH, length.get());
            fields.number(CHECKSUM, checksum.map_or(0, Checksum::get));
            fields.push(&[BLOCK_ID, 16]);
            fields.push(&block.to_bytes());
            let (tier, device) = convert::memory(*memory);
            fields.small(TIER, tier as i32);
            fields.number(DEVICE, device.into());
        }
        Grant::Promoting | Grant::Missing(_) | Grant::Throttled | Grant::Exists => {}
    }
}

/// Fields of one grant, or of anything shorter.
struct Fields {
    room: [u8; GRANT_BYTES_MAX],
    length: usize,
}

impl Default for Fields {
    fn default() -> Self {
        Self { room: [0; GRANT_BYTES_MAX], length: 0 }
    }
}

impl Fields {
    fn bytes(&self) -> &[u8] {
        &self.room[..self.length]
    }

    fn push(&mut self, bytes: &[u8]) {
        self.room[self.length..][..bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }

    /// A value of an enum of ours, which are few.
    fn small(&mut self, tag: u8, value: i32) {
        self.number(tag, u64::try_from(value).expect("values of our enums are small and positive"));
    }

    /// A number; nothing if it is 0.
    fn number(&mut self, tag: u8, number: u64) {
        if number != 0 {
            self.push(&[tag]);
            self.value(number);
        }
    }

    fn value(&mut self, mut value: u64) {
        while value >= 0x80 {
            let [low, ..] = value.to_le_bytes();
            self.push(&[low | 0x80]);
            value >>= 7;
        }
        let [low, ..] = value.to_le_bytes();
        self.push(&[low]);
    }
}

/// Where the fields are, that a change of the messages does not compile without a look at this file.
const _: fn(v1::BlockGrant) = |grant| {
    let v1::BlockGrant {
        outcome: _,
        reason: _,
        chunk: _,
        frame: _,
        offset: _,
        fence: _,
        length: _,
        checksum: _,
        block_id: _,
        tier: _,
        device: _,
    } = grant;
};
const _: fn(v1::LeaseResponse) = |leased| {
    let v1::LeaseResponse { lease: _, ttl_ms: _, blocks: _, generation: _, packed: _ } = leased;
};

#[cfg(test)]
mod tests {
    use prost::Message;

    use terrace_core::{BlockId, ChunkId, Fence, FrameRef, GpuId, Memory, MissReason};

    use super::*;

    fn granted(number: u64, memory: Memory) -> Grant {
        let frame =
            FrameRef { chunk: ChunkId::new(number >> 32), index: u32::try_from(number & 0xFFFF).unwrap() };
        Grant::Granted {
            block: BlockId::from_bytes([7; 16]),
            frame,
            fence: Fence::new(number),
            offset: number,
            length: ByteCount::new(number),
            checksum: (number % 2 == 1).then(|| Checksum::new(number)),
            memory,
        }
    }

    // A field in the wrong place would be another block's frame: every kind of grant, with numbers of every length, is
    // compared with what the generated code makes of the same answer.
    #[test]
    fn the_bytes_are_those_of_the_generated_code() {
        let mut grants: Vec<Grant> = (0..64).map(|bit| granted(1 << bit, Memory::Pinned)).collect();
        grants.extend((0..64).map(|bit| granted(u64::MAX >> bit, Memory::Hbm(GpuId::new(3)))));
        grants.extend([Grant::Promoting, Grant::Throttled, Grant::Exists]);
        grants.extend([MissReason::Unknown, MissReason::Filling, MissReason::Device].map(Grant::Missing));
        for (lease, count) in
            [(None, 0), (Some(LeaseId::new(1)), 1), (Some(LeaseId::new(u64::MAX)), grants.len())]
        {
            let grants = &grants[..count];
            let ttl = Micros::from_millis(10_000);
            let ours = leased(300, &Leased { lease, ttl, generation: 5, grants });
            let wire = v1::LeaseResponse {
                lease: lease.map_or(0, LeaseId::get),
                ttl_ms: 10_000,
                blocks: convert::grants(grants),
                generation: 5,
                ..Default::default()
            };
            let result = Some(v1::lane_response::Result::Lease(wire));
            assert_eq!(ours, v1::LaneResponse { id: 300, result }.encode_to_vec(), "{count} grants");
        }
    }

    // The same for packed ones, read as a client reads them.
    #[test]
    fn packed_grants_are_those_of_the_generated_code() {
        let hbm = Memory::Hbm(GpuId::new(3));
        let fences = (1 << 60, (1 << 60) + u64::from(u32::MAX));
        // Frame n of chunk n / 8, with the youngest and the oldest fence that go together.
        let place = |n: u32| Grant::Granted {
            block: BlockId::from_bytes([u8::try_from(n % 256).unwrap(); 16]),
            frame: FrameRef { chunk: ChunkId::new(u64::from(n) / 8), index: n },
            fence: Fence::new(if n.is_multiple_of(2) { fences.0 } else { fences.1 }),
            offset: u64::from(n) * 3 * 4096 + 4096,
            length: ByteCount::new(5000),
            checksum: (!n.is_multiple_of(3)).then(|| Checksum::new(u64::MAX - u64::from(n))),
            memory: if n < 20 { Memory::Pinned } else { hbm },
        };
        let mut grants = vec![Grant::Throttled, Grant::Exists];
        grants.extend((0..64).map(place));
        grants.extend([MissReason::Unknown, MissReason::Filling, MissReason::Device].map(Grant::Missing));
        grants.extend([Grant::Promoting, Grant::Promoting, place(63)]);
        let ttl = Micros::from_millis(10_000);
        let leased = Leased { lease: Some(LeaseId::new(9)), ttl, generation: 5, grants: &grants };
        let answer = packed(&leased, true).unwrap();
        assert_eq!((answer.lease, answer.ttl_ms, answer.generation), (9, 10_000, 5));
        let whole = answer.packed.unwrap();
        let v1::PackedGrants { runs, grants: bytes, fence, length, frame_bytes, block_ids } = whole.clone();
        // 8 chunks, of which one is on both media, and seven others.
        assert_eq!((runs.len(), fence, length, frame_bytes), (16, fences.0, 5000, 3 * 4096));
        let mut ids = block_ids.as_chunks::<16>().0.iter();
        let mut places = bytes.as_chunks().0.iter().map(PackedGrant::from_bytes);
        let each = runs.iter().flat_map(|run| (0..run.blocks).map(move |_| run));
        let found: Vec<_> = each
            .map(|run| {
                let mut wire =
                    v1::BlockGrant { outcome: run.outcome, reason: run.reason, ..Default::default() };
                if run.outcome() == v1::GrantOutcome::Granted {
                    let grant = places.next().unwrap();
                    (wire.chunk, wire.frame, wire.tier, wire.device) =
                        (run.chunk, grant.frame, run.tier, run.device);
                    wire.offset = u64::from(grant.frame) * frame_bytes + 4096;
                    (wire.fence, wire.checksum) = (fence + u64::from(grant.fence), grant.checksum);
                    (wire.length, wire.block_id) = (length, ids.next().unwrap().to_vec().into());
                }
                wire
            })
            .collect();
        assert_eq!(found, convert::grants(&grants));
        assert_eq!((places.next(), ids.next()), (None, None), "more than was granted");
        let brief = packed(&leased, false).unwrap().packed.unwrap();
        assert_eq!(v1::PackedGrants { block_ids, ..brief }, whole);
    }

    // What has no such places is answered by fields.
    #[test]
    fn what_cannot_be_packed_is_not() {
        let place = |n: u32, fence: u64, length: u64, more: u64| Grant::Granted {
            block: BlockId::from_bytes([7; 16]),
            frame: FrameRef { chunk: ChunkId::new(u64::from(n)), index: n },
            fence: Fence::new(fence),
            offset: u64::from(n) * 3 * 4096 + 4096 + more,
            length: ByteCount::new(length),
            checksum: None,
            memory: Memory::Pinned,
        };
        let can = |grants: &[Grant]| {
            let ttl = Micros::from_millis(10_000);
            packed(&Leased { lease: None, ttl, generation: 5, grants }, true).is_some()
        };
        let first = place(1, 1 << 40, 5000, 0);
        assert!(can(&[]) && can(&[Grant::Promoting]) && can(&[first, place(2, 1 << 40, 5000, 0)]));
        assert!(!can(&[first, place(2, 1 << 40, 5001, 0)]), "two lengths");
        assert!(!can(&[first, place(2, 1 << 40, 5000, 4096)]), "a payload elsewhere");
        assert!(!can(&[first, place(2, 1 << 39, 5000, 0)]), "fences far from each other");
        let apart: Vec<_> = (0..19).map(|n| place(n, 5, 5000, 0)).collect();
        assert!(can(&apart[..18]) && !can(&apart), "hardly any run");
    }
}
