//! Sessions, their leases, and the answers remembered for repeats.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::api::{Locality, Reply};
use crate::ids::{
    BlockId, ChunkId, ClientId, Fence, FrameRef, LeaseId, Memory, RequestId, SessionId, TenantId,
};
use crate::policy::class::Tick;
use crate::state::space::SpaceIndex;
use crate::units::{Micros, Now};

/// Identity of a request that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct WaitId(pub(crate) u64);

/// Most requests that may share one waiting answer under one repeat id.
pub(crate) const REPEATS_WAITING_MAX: usize = 8;

/// One session.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) tenant: TenantId,
    pub(crate) locality: Locality,
    pub(crate) leases: BTreeSet<LeaseId>,
    pub(crate) windows: BTreeSet<ChunkId>,
    /// Pinned by its leases and held by its windows.
    pub(crate) leased_bytes: u64,
    pub(crate) waits: BTreeSet<WaitId>,
    /// Who goes on by another connection when this one breaks.
    pub(crate) client: Option<ClientId>,
    pub(crate) repeats: Repeats,
    /// Its last request for a prefix, so that writing the rest of it is no request of its own.
    pub(crate) asked: Option<Asked>,
    /// The memory of a chunk that it had mapped did not come back in time, the last time that one was dropped.
    pub(crate) holds_on: bool,
    /// It has filled a window, and so will fill the next one.
    pub(crate) fills: bool,
}

/// A request for a prefix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// Its first block.
    pub(crate) first: Option<BlockId>,
    pub(crate) at: Tick,
    pub(crate) space: SpaceIndex,
    /// Blocks of it that are or were to be computed.
    pub(crate) added: u32,
}

/// Requests with a repeat id that wait, and the answers of the last ones. Who waits is not forgotten: those are few.
#[derive(Debug, Default)]
pub(crate) struct Repeats {
    answers: BTreeMap<u64, Remembered>,
    /// What was answered, from the first to the last. Leases are many, and worth nothing without the session: they
    /// must not push out what a repeat over another connection asks for.
    leases: VecDeque<u64>,
    others: VecDeque<u64>,
}

#[derive(Debug)]
struct Remembered {
    content: u64,
    answer: Answer,
}

/// What became of the first request of a repeat id.
#[derive(Debug)]
pub(crate) enum Answer {
    /// It waits; these requests get its answer as well.
    Waiting(Vec<RequestId>),
    /// Its answer.
    Given(Arc<Reply>),
    /// It was a read lease of so many blocks, which has ended: what was granted is kept no longer than that.
    Ended { blocks: usize },
    /// The session went while the space was being cleared to this generation; so many blocks were dropped.
    Clearing { space: SpaceIndex, generation: u64, blocks: u64 },
}

/// What a repeat id says about a request.
#[derive(Debug)]
pub(crate) enum Seen {
    /// Not seen before.
    New,
    /// Seen with other content.
    Differs,
    /// The same request; here is what became of it.
    Same,
}

impl Repeats {
    pub(crate) fn look(&self, repeat: u64, content: u64) -> Seen {
        match self.answers.get(&repeat) {
            None => Seen::New,
            Some(seen) if seen.content != content => Seen::Differs,
            Some(_) => Seen::Same,
        }
    }

    pub(crate) fn remembers(&self, repeat: u64) -> bool {
        self.answers.contains_key(&repeat)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// The session is gone: what was leased is too, and nobody waits any more.
    pub(crate) fn depart(&mut self) {
        self.answers.retain(|_, seen| match &seen.answer {
            Answer::Waiting(_) | Answer::Ended { .. } => false,
            Answer::Given(reply) => !matches!(**reply, Reply::Leased { .. }),
            Answer::Clearing { .. } => true,
        });
        self.leases.clear();
    }

    /// The session goes while the request still clears the space.
    pub(crate) fn clearing(
        &mut self,
        repeat: u64,
        (space, generation, blocks): (SpaceIndex, u64, u64),
        limit: u32,
    ) {
        let Some(seen) = self.answers.get_mut(&repeat) else { return };
        if let Answer::Waiting(_) = seen.answer {
            seen.answer = Answer::Clearing { space, generation, blocks };
            self.remember(repeat, Worth::Lasts, limit);
        }
    }

    /// The lease that a request was answered with has ended.
    pub(crate) fn ended(&mut self, repeat: u64) {
        if let Some(seen) = self.answers.get_mut(&repeat)
            && let Answer::Given(reply) = &seen.answer
            && let Reply::Leased { blocks, .. } = &**reply
        {
            seen.answer = Answer::Ended { blocks: blocks.len() };
        }
    }

    pub(crate) fn answer_mut(&mut self, repeat: u64) -> Option<&mut Answer> {
        self.answers.get_mut(&repeat).map(|seen| &mut seen.answer)
    }

    /// A request is being served.
    pub(crate) fn begin(&mut self, repeat: u64, content: u64) {
        self.answers.insert(repeat, Remembered { content, answer: Answer::Waiting(Vec::new()) });
    }

    /// Ends a request: remembers its answer, or forgets it so that it can be
    /// tried again. Returns the requests that wait for the same answer.
    pub(crate) fn finish(&mut self, repeat: u64, reply: &Arc<Reply>, limit: u32) -> Vec<RequestId> {
        let Some(seen) = self.answers.get_mut(&repeat) else { return Vec::new() };
        let Answer::Waiting(also) = std::mem::replace(&mut seen.answer, Answer::Given(Arc::clone(reply)))
        else {
            return Vec::new();
        };
        match **reply {
            Reply::Throttled(_) | Reply::Refused(_) => {
                self.answers.remove(&repeat);
            }
            Reply::Leased { .. } => self.remember(repeat, Worth::EndsWithSession, limit),
            Reply::Matched { .. }
            | Reply::Sealed { .. }
            | Reply::Renewed { .. }
            | Reply::Released { .. }
            | Reply::Aborted { .. }
            | Reply::Touched { .. }
            | Reply::Prefetched { .. }
            | Reply::Retained { .. }
            | Reply::Cleared { .. }
            | Reply::WindowReturned { .. }
            | Reply::MayMap { .. }
            | Reply::Flushed { .. }
            | Reply::Shrunk { .. } => self.remember(repeat, Worth::Lasts, limit),
        }
        also
    }

    /// Forgets the oldest of the same worth past the limit.
    fn remember(&mut self, repeat: u64, worth: Worth, limit: u32) {
        let order = match worth {
            Worth::EndsWithSession => &mut self.leases,
            Worth::Lasts => &mut self.others,
        };
        while order.len() >= limit.max(1) as usize {
            let Some(oldest) = order.pop_front() else { break };
            self.answers.remove(&oldest);
        }
        order.push_back(repeat);
    }

    /// `waiting`: requests of the session that wait.
    pub(crate) fn check(&self, waiting: usize, limit: u32) {
        let waits = |seen: &Remembered| matches!(seen.answer, Answer::Waiting(_));
        let open = self.answers.values().filter(|seen| waits(seen)).count();
        assert!(open <= waiting, "whose answer is open waits");
        assert!(self.leases.len() <= limit.max(1) as usize, "answers to leases are limited");
        assert!(self.others.len() <= limit.max(1) as usize, "answers that last are limited");
        let mut given = self.leases.iter().chain(&self.others);
        assert!(
            given.all(|repeat| self.answers.get(repeat).is_some_and(|seen| !waits(seen))),
            "it was answered"
        );
        assert_eq!(self.answers.len(), open + self.leases.len() + self.others.len(), "each is somewhere");
    }
}

/// How long an answer is worth remembering.
#[derive(Clone, Copy, Debug)]
enum Worth {
    EndsWithSession,
    Lasts,
}

/// What a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeaseKind {
    Read,
    Write { space: SpaceIndex, memory: Memory },
}

/// One block of a lease: a frame that it fills or pins, as long as the frame's fence has not moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) frame: FrameRef,
    pub(crate) fence: Fence,
    /// Charged to the tenant.
    pub(crate) bytes: u64,
}

/// One lease.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) session: SessionId,
    pub(crate) tenant: TenantId,
    pub(crate) kind: LeaseKind,
    /// By position in the request.
    pub(crate) items: Vec<Option<Held>>,
    pub(crate) ttl: Micros,
    /// `None`: does not end by itself.
    pub(crate) deadline: Option<Now>,
    /// The request that asked for it, to read.
    pub(crate) repeat: Option<u64>,
    /// Its space was cleared: nothing of it can be sealed any more.
    pub(crate) cleared: bool,
    pub(crate) since: Now,
    /// Its grant or last seal: blocks sealed next were computed since.
    pub(crate) mark: Now,
}
