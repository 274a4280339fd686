//! Whole blocks into the session's windows.
//!
//! They are written by the run: while one is filled, the next is leased and the one before is sealed, so that the caller
//! waits for the daemon at the beginning and at the end only.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use bytes::Bytes;
use tokio::time::timeout_at;

use terrace_core::{Checksum, Durability, SealOutcome};
use terrace_proto::v1::{LeaseKind, LeasePurpose};

use crate::convert::parent_to_wire;
use crate::early::{Early, FilledEarly};
use crate::error::ClientError;
use crate::get::{copy_each, is_past_the_cache};
use crate::keyed::Named;
use crate::lease::{Outcome, Wanted, lease};
use crate::session::{LaneSession, Session};
use crate::space::Space;
use crate::transfer::{READ_WAIT, WRITE_WAIT, back_off};
use crate::write::{WriteBlock, WriteLease};

/// Bytes of a run, at most: what one write pins is limited.
const RUN_BYTES: u64 = 32 << 20;
const RUN_BLOCKS: u64 = 1024;
/// Of many blocks, the first and the last run are this part only, for nothing is filled while the first is leased and the
/// last is sealed. Of few, that takes no longer than another run.
const EDGE_PART: usize = 8;
const MANY: usize = 256;
/// Runs that wait for the answer to their seal.
const SEALING_MAX: usize = 4;

/// What is to be written.
pub(crate) struct Put<'a, K> {
    pub(crate) space: &'a Space,
    pub(crate) keys: &'a [K],
    pub(crate) parent: Option<&'a [u8]>,
    pub(crate) payloads: &'a [&'a [u8]],
    pub(crate) durability: Durability,
}

/// A question on its way: the caller does something else until it wants the answer.
enum Asked<F: Future> {
    Waiting(Pin<Box<F>>),
    Answered(F::Output),
}

impl<F: Future> Asked<F> {
    /// Asks, on the caller's own thread, and goes on as far as that needs no answer.
    async fn begin(question: F) -> Self {
        let mut asked = Self::Waiting(Box::pin(question));
        asked.is_answered().await;
        asked
    }

    async fn is_answered(&mut self) -> bool {
        let Self::Waiting(question) = self else { return true };
        let answer = poll_fn(|context| Poll::Ready(question.as_mut().poll(context))).await;
        if let Poll::Ready(answer) = answer {
            *self = Self::Answered(answer);
            return true;
        }
        false
    }

    async fn is_answered_by(&mut self, then: Instant) -> bool {
        let Self::Waiting(question) = self else { return true };
        match timeout_at(then.into(), question.as_mut()).await {
            Ok(answer) => {
                *self = Self::Answered(answer);
                true
            }
            Err(_) => false,
        }
    }

    async fn end(self) -> F::Output {
        match self {
            Self::Waiting(question) => question.await,
            Self::Answered(answer) => answer,
        }
    }
}

/// Positions of a run that were filled, and what they are sealed with.
type Filled = (Vec<usize>, Vec<(u32, Checksum)>);

impl Session {
    /// Puts blocks whose keys and payloads were checked.
    pub(crate) async fn write_lane(
        &self,
        put: &Put<'_, impl AsRef<[u8]>>,
    ) -> Result<Vec<SealOutcome>, ClientError> {
        let deadline = Instant::now() + WRITE_WAIT;
        let mut outcomes: Vec<Option<SealOutcome>> = vec![None; put.keys.len()];
        loop {
            let open = runs(&outcomes, put.space);
            let before = open.iter().map(Range::len).sum::<usize>();
            if before == 0 {
                return Ok(outcomes.into_iter().flatten().collect());
            }
            self.write_runs(put, &open, &mut outcomes).await?;
            if outcomes.iter().filter(|outcome| outcome.is_none()).count() == before {
                back_off(deadline).await?;
            }
        }
    }

    /// One attempt; nothing becomes of a block that no frame was to be had for.
    async fn write_runs(
        &self,
        put: &Put<'_, impl AsRef<[u8]>>,
        open: &[Range<usize>],
        outcomes: &mut [Option<SealOutcome>],
    ) -> Result<(), ClientError> {
        let Some(first) = open.first() else { return Ok(()) };
        let (mut sealing, mut next) = (VecDeque::new(), None);
        let (mut lease, mut early) = self.lease_first(put, first).await?;
        for (at, run) in open.iter().enumerate() {
            if let Some(run) = open.get(at + 1) {
                next = Some(Asked::begin(self.leasing(put, run)?.ask(false)).await);
                self.lane("write")?.link.send_now()?;
            }
            if is_past_the_cache(put.space, put.keys.len()) {
                lease.go_past_the_cache();
            }
            lease.drain_later();
            let payloads = &put.payloads[run.clone()];
            let sums = fill(&mut lease, payloads, &early, (put.space, self.inner.copy_threads));
            let (filled, sums) = told_apart(&lease, run.start, sums, outcomes)?;
            early.clear();
            sealing.push_back((filled, Asked::begin(seal(lease, sums, put.durability)).await));
            let Some(mut asked) = next.take() else { break };
            look_at_the_socket().await;
            // What these pin may be what the next one waits for.
            while sealing.len() > SEALING_MAX || !asked.is_answered().await {
                let Some((filled, sealed)) = sealing.pop_front() else { break };
                told(&filled, sealed.end().await?, outcomes);
            }
            lease = asked.end().await?;
        }
        for (filled, sealed) in sealing {
            told(&filled, sealed.end().await?, outcomes);
        }
        Ok(())
    }

    /// Leases the first run, and fills meanwhile what it will probably be granted.
    async fn lease_first<K: AsRef<[u8]>>(
        &self,
        put: &Put<'_, K>,
        first: &Range<usize>,
    ) -> Result<(WriteLease, Vec<FilledEarly>), ClientError> {
        let leasing = self.leasing(put, first)?;
        let lane = Arc::clone(&leasing.lane);
        let Some((turn, mut early)) = Early::begin(&lane, put, first.clone()) else {
            return Ok((leasing.ask(false).await?, Vec::new()));
        };
        let mut asked = Asked::begin(leasing.ask(true)).await;
        while !asked.is_answered().await && early.go_on() {
            look_at_the_socket().await;
        }
        if !asked.is_answered_by(early.held_until()).await {
            drop((early, turn));
            return Ok((asked.end().await?, Vec::new()));
        }
        Ok((asked.end().await?, early.end()))
    }

    fn leasing(&self, put: &Put<'_, impl AsRef<[u8]>>, run: &Range<usize>) -> Result<Leasing, ClientError> {
        let parent = match run.start.checked_sub(1) {
            Some(before) => Some(put.keys[before].as_ref()),
            None => put.parent,
        };
        Ok(Leasing {
            lane: Arc::clone(self.lane("write")?),
            space: put.space.clone(),
            keys: self.named(put.space, &put.keys[run.clone()], LeaseKind::Write)?,
            parent: parent_to_wire(parent)?,
        })
    }
}

/// The question for a run, whoever asks it.
struct Leasing {
    lane: Arc<LaneSession>,
    space: Space,
    keys: Named,
    parent: Bytes,
}

impl Leasing {
    /// Given up, what was granted is released.
    async fn ask(self, alone: bool) -> Result<WriteLease, ClientError> {
        let Self { lane, space, keys, parent } = self;
        let wanted = Wanted {
            space: &space,
            kind: LeaseKind::Write,
            keys,
            parent,
            ttl: None,
            wait: READ_WAIT,
            purpose: LeasePurpose::Unspecified,
            device: None,
            alone,
        };
        let (lease, grants) = lease(&lane, wanted, WriteBlock::new).await?;
        Ok(WriteLease { lease, grants })
    }
}

/// Once for the socket to be looked at, and once for whoever reads it.
async fn look_at_the_socket() {
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
}

/// Runs of blocks that are still to be written, so that each one's parent is the one before it.
fn runs(outcomes: &[Option<SealOutcome>], space: &Space) -> Vec<Range<usize>> {
    let block = space.block_bytes().get().max(1);
    let blocks = usize::try_from((RUN_BYTES / block).clamp(1, RUN_BLOCKS)).unwrap_or(1);
    open(outcomes).into_iter().flat_map(|open| cut(open, blocks)).collect()
}

fn open(outcomes: &[Option<SealOutcome>]) -> Vec<Range<usize>> {
    let mut open: Vec<Range<usize>> = Vec::new();
    for (at, _) in outcomes.iter().enumerate().filter(|(_, outcome)| outcome.is_none()) {
        match open.last_mut().filter(|open| open.end == at) {
            Some(open) => open.end += 1,
            None => open.push(at..at + 1),
        }
    }
    open
}

/// Equal runs of `most` blocks at most, between short ones where there are many.
fn cut(open: Range<usize>, most: usize) -> Vec<Range<usize>> {
    if open.len() < MANY {
        return pieces(open, most);
    }
    let edge = (open.len() / EDGE_PART).min(most);
    let (first, last) = (open.start + edge, open.end - edge);
    let mut runs = pieces(first..last, most);
    runs.insert(0, open.start..first);
    runs.push(last..open.end);
    runs
}

/// Equal ones, or nearly so.
fn pieces(open: Range<usize>, most: usize) -> Vec<Range<usize>> {
    let count = open.len().div_ceil(most);
    let at = |piece: usize| open.start + open.len() * piece / count;
    (0..count).map(|piece| at(piece)..at(piece + 1)).collect()
}

/// Fills what was granted, but for what was filled early, by so many threads; answers what each is sealed with. Blocks of a
/// run and what was filled early begin together.
fn fill(
    lease: &mut WriteLease,
    payloads: &[&[u8]],
    early: &[FilledEarly],
    (space, threads): (&Space, usize),
) -> Vec<Option<Result<Checksum, ClientError>>> {
    let mut sums: Vec<_> = payloads.iter().map(|_| None).collect();
    let mut blocks = Vec::with_capacity(payloads.len());
    let run = lease.grants.iter_mut().zip(payloads).zip(&mut sums).enumerate();
    for (at, ((grant, payload), sum)) in run {
        let Some(block) = grant.granted_mut() else { continue };
        // Of the payload, not of the frame: what is sealed is what was given.
        match early.get(at).filter(|early| block.is(early)) {
            Some(early) => *sum = Some(Ok(early.checksum)),
            None => blocks.push((block, payload, sum)),
        }
    }
    copy_each(space, threads, &mut blocks, |(block, payload, sum), called| {
        **sum = Some(block.write_checked_by(payload, called));
    });
    sums
}

/// Of a run that begins at `start`, the positions that were filled, and what they are sealed with.
fn told_apart(
    lease: &WriteLease,
    start: usize,
    sums: Vec<Option<Result<Checksum, ClientError>>>,
    outcomes: &mut [Option<SealOutcome>],
) -> Result<Filled, ClientError> {
    let (mut filled, mut sealed) = (Vec::with_capacity(sums.len()), Vec::with_capacity(sums.len()));
    for (((index, at), grant), sum) in (0u32..).zip(start..).zip(&lease.grants).zip(sums) {
        if let Some(sum) = sum {
            sealed.push((index, sum?));
            filled.push(at);
        } else if matches!(grant, Outcome::Exists) {
            outcomes[at] = Some(SealOutcome::Already);
        }
    }
    Ok((filled, sealed))
}

/// Seals, and gives the lease back with the next question.
async fn seal(
    mut lease: WriteLease,
    sums: Vec<(u32, Checksum)>,
    durability: Durability,
) -> Result<Vec<SealOutcome>, ClientError> {
    let sealed = lease.seal_with(&sums, durability).await?;
    lease.end_soon();
    Ok(sealed)
}

fn told(filled: &[usize], sealed: Vec<SealOutcome>, outcomes: &mut [Option<SealOutcome>]) {
    for (at, outcome) in filled.iter().zip(sealed) {
        outcomes[*at] = Some(outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // A run that reaches over a block which is there already would name the wrong parent for the one behind it, one that
    // is left out would be asked for without end, and one that is too long would pin too much.
    #[test]
    fn runs_are_what_is_open_and_no_longer_than_allowed() {
        let done = Some(SealOutcome::Sealed);
        assert_eq!(open(&[None, done, None, None, done]), [0..1, 2..4]);
        assert_eq!(open(&[done, done]), []);
        assert_eq!(cut(3..5, 1), [3..4, 4..5]);
        assert_eq!(cut(2..66, 32), [2..34, 34..66]);
        assert_eq!(cut(0..1024, 512), [0..128, 128..512, 512..896, 896..1024]);
        for (length, most) in [(1024, 512), (1, 1), (64, 32), (7000, 512), (8, 4), (300, 1)] {
            let runs = cut(5..5 + length, most);
            assert_eq!((runs[0].start, runs[runs.len() - 1].end), (5, 5 + length));
            assert!(runs.windows(2).all(|pair| pair[0].end == pair[1].start), "{runs:?}");
            assert!(runs.iter().all(|run| (1..=most).contains(&run.len())), "{runs:?}");
        }
    }
}
