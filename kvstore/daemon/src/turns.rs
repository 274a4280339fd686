//! Whose turn it is at the core, which serves one request at a time.
//!
//! Promises: while nobody waits, a turn costs one uncontended lock. When
//! sessions compete, each gets the same share of blocks, however many requests
//! it has waiting: deficit round robin. A session that waits with more than its
//! queue holds is told so, and nothing grows.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use terrace_core::SessionId;

/// Work that a session may do before the next one's turn, in blocks. A request
/// of 128 blocks takes about 20 us, and is what most requests are smaller than.
const QUANTUM: u32 = 128;

/// The queue of a session is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueFull;

/// What waits, by session. It has no clock and wakes nobody.
#[derive(Debug)]
struct Turns<T> {
    queues: BTreeMap<SessionId, Queue<T>>,
    /// Sessions that wait; the first one is being served.
    ring: VecDeque<SessionId>,
    queue_max: usize,
}

#[derive(Debug)]
struct Queue<T> {
    waiting: VecDeque<(u32, T)>,
    /// Blocks that it may yet do in this round.
    deficit: u32,
}

impl<T> Turns<T> {
    fn new(queue_max: usize) -> Self {
        Self { queues: BTreeMap::new(), ring: VecDeque::new(), queue_max }
    }

    fn push(&mut self, session: SessionId, cost: u32, item: T) -> Result<(), QueueFull> {
        let queue = self.queues.entry(session).or_insert_with(|| {
            self.ring.push_back(session);
            Queue { waiting: VecDeque::new(), deficit: QUANTUM }
        });
        if queue.waiting.len() >= self.queue_max {
            return Err(QueueFull);
        }
        queue.waiting.push_back((cost, item));
        Ok(())
    }

    /// Who is next. A session that has nothing left to do keeps nothing of its share.
    fn pop(&mut self) -> Option<T> {
        loop {
            let &session = self.ring.front()?;
            let queue = self.queues.get_mut(&session)?;
            let &(cost, _) = queue.waiting.front()?;
            if cost > queue.deficit {
                queue.deficit = queue.deficit.saturating_add(QUANTUM);
                self.ring.rotate_left(1);
                continue;
            }
            queue.deficit -= cost;
            let (_, item) = queue.waiting.pop_front()?;
            if queue.waiting.is_empty() {
                self.queues.remove(&session);
                self.ring.pop_front();
            }
            return Some(item);
        }
    }
}

/// Hands out turns, one at a time.
#[derive(Debug)]
pub(crate) struct Gate(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Nobody has a turn, and so nobody waits.
    free: bool,
    turns: Turns<oneshot::Sender<Turn>>,
}

/// The right to speak to the core. Dropped, it is the next one's.
#[derive(Debug)]
pub(crate) struct Turn(Option<Arc<Gate>>);

impl Gate {
    /// `queue_max`: requests that one session may have waiting.
    pub(crate) fn new(queue_max: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { free: true, turns: Turns::new(queue_max) })))
    }

    /// Waits for a turn for this much work, in blocks. Cancel-safe.
    pub(crate) async fn turn(self: &Arc<Self>, session: SessionId, cost: u32) -> Result<Turn, QueueFull> {
        let waited = {
            let mut state = self.state();
            if state.free {
                state.free = false;
                return Ok(Turn(Some(Arc::clone(self))));
            }
            let (sender, waited) = oneshot::channel();
            state.turns.push(session, cost, sender)?;
            waited
        };
        // The gate lives as long as its waiters, and drops none of them unserved.
        waited.await.map_err(|_| QueueFull)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass_on(self: Arc<Self>) {
        loop {
            let next = {
                let mut state = self.state();
                let next = state.turns.pop();
                state.free = next.is_none();
                next
            };
            let Some(next) = next else { return };
            match next.send(Turn(Some(Arc::clone(&self)))) {
                Ok(()) => return,
                // It waits no more; the turn must not come back by its own drop while we hold it.
                Err(mut turn) => turn.0 = None,
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(gate) = self.0.take() {
            gate.pass_on();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const ONE: SessionId = SessionId::new(1);
    const TWO: SessionId = SessionId::new(2);
    const THREE: SessionId = SessionId::new(3);

    /// A session with a million requests before it must not make another wait for more than a quantum's worth.
    #[test]
    fn a_flood_delays_others_by_one_quantum() {
        let mut turns = Turns::new(1 << 20);
        (0..100_000).for_each(|_| turns.push(ONE, 1, ONE).unwrap());
        (0..50).for_each(|_| assert_eq!(turns.pop(), Some(ONE)));
        turns.push(TWO, 8, TWO).unwrap();
        let before = std::iter::from_fn(|| turns.pop()).take_while(|session| *session == ONE).count();
        assert!(before <= QUANTUM as usize, "{before} requests of the flood came first");
    }

    /// Sessions whose requests differ in size must get the same share of blocks, and in their own order.
    #[test]
    fn shares_are_of_blocks_not_of_requests() {
        let mut turns = Turns::new(1 << 20);
        let costs = [(ONE, 1), (TWO, 100), (THREE, 1024)];
        for (session, cost) in costs {
            (0..200_000 / cost)
                .for_each(|number| turns.push(session, cost, (session, cost, number)).unwrap());
        }
        let mut done = BTreeMap::from(costs.map(|(session, _)| (session, (0u32, 0u32))));
        for _ in 0..2_000 {
            let (session, cost, number) = turns.pop().unwrap();
            let (blocks, next) = done.get_mut(&session).unwrap();
            assert_eq!(number, *next, "the order of a session's own requests");
            *next += 1;
            *blocks += cost;
        }
        let blocks: Vec<u32> = done.values().map(|(blocks, _)| *blocks).collect();
        let spread = blocks.iter().max().unwrap() - blocks.iter().min().unwrap();
        assert!(spread <= 1024 + QUANTUM, "shares {blocks:?}");
    }

    /// Whoever pauses must not save up turns, and one session alone must never wait.
    #[test]
    fn nothing_is_saved_up() {
        let mut turns = Turns::new(8);
        for _ in 0..1000 {
            turns.push(ONE, 1, ()).unwrap();
            assert!(turns.pop().is_some());
        }
        assert!(turns.pop().is_none() && turns.queues.is_empty() && turns.ring.is_empty());
        (0..8).for_each(|_| turns.push(ONE, 5000, ()).unwrap());
        assert_eq!(turns.push(ONE, 1, ()), Err(QueueFull));
        assert_eq!(turns.push(TWO, 1, ()), Ok(()), "the queue of another session");
        assert_eq!(std::iter::from_fn(|| turns.pop()).count(), 9);
    }

    /// A turn is one at a time, goes to the next in line, and is not lost with a waiter that went away, before it was
    /// given or after.
    #[tokio::test]
    async fn a_turn_is_never_lost() {
        let gate = Gate::new(4);
        let first = gate.turn(ONE, 1).await.unwrap();
        let waiter = |session| {
            let gate = gate.clone();
            tokio::spawn(async move { gate.turn(session, 1).await.unwrap() })
        };
        let (gone, second) = (waiter(ONE), waiter(TWO));
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        gone.abort();
        tokio::task::yield_now().await;
        drop(first);
        let second = second.await.unwrap();
        // Given, and never taken.
        let mut third = Box::pin(gate.turn(THREE, 1));
        assert!(third.as_mut().now_or_never().is_none());
        drop(second);
        drop(third);
        drop(gate.turn(ONE, 1).await.unwrap());
        assert!(gate.state().free);
    }
}
