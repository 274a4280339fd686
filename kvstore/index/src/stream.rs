//! Which events of a publisher may be applied: numbers in sequence, of its latest life.
//!
//! A publisher numbers its events and says which incarnation of it speaks. A number that is missing, a
//! later incarnation, or a subscriber that knows nothing yet means: ask for the tail or for a snapshot, and
//! apply nothing until it is there. A state machine without a clock or a queue: the caller
//! fetches, and holds back what [`Verdict::Resync`] refused or lets the publisher send it again.

/// What to do with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the next one.
    Apply,
    /// It was applied before, or is of an earlier life.
    Drop,
    /// Something is missing before it: the tail from `from` on, or a snapshot if the publisher has no such
    /// tail or lives a new life. Not applied.
    Resync {
        /// The number that is wanted next; none if only a snapshot helps.
        from: Option<u64>,
    },
}

/// How often each of it happened, for a metric.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Events applied.
    pub applied: u64,
    /// Events that had been applied before.
    pub repeated: u64,
    /// Events and snapshots of an earlier life.
    pub outdated: u64,
    /// Times that numbers were missing.
    pub gaps: u64,
}

/// One publisher, as a subscriber sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stream {
    /// Its latest life that was heard of.
    incarnation: u64,
    /// The number that comes next; none before a snapshot of this life.
    next: Option<u64>,
    tally: Tally,
}

impl Stream {
    /// Nothing heard yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// An event's number and the life it is of.
    pub fn event(&mut self, incarnation: u64, number: u64) -> Verdict {
        if incarnation < self.incarnation {
            self.tally.outdated += 1;
            return Verdict::Drop;
        }
        if incarnation > self.incarnation {
            self.incarnation = incarnation;
            // A new life holds nothing but what it tells, from its first event on.
            self.next = None;
        }
        match self.next {
            None => {
                self.tally.gaps += 1;
                Verdict::Resync { from: None }
            }
            Some(next) if number < next => {
                self.tally.repeated += 1;
                Verdict::Drop
            }
            Some(next) if number > next => {
                self.tally.gaps += 1;
                Verdict::Resync { from: Some(next) }
            }
            Some(next) => {
                // The last number there is has no next: only a snapshot of another life follows it.
                self.next = next.checked_add(1);
                self.tally.applied += 1;
                Verdict::Apply
            }
        }
    }

    /// A snapshot that contains every event below `next`. False if it is older than what was applied, or
    /// of an earlier life; then it must not be used.
    pub fn snapshot(&mut self, incarnation: u64, next: u64) -> bool {
        let outdated = incarnation < self.incarnation
            || incarnation == self.incarnation && self.next.is_some_and(|known| next < known);
        if outdated {
            self.tally.outdated += 1;
            return false;
        }
        (self.incarnation, self.next) = (incarnation, Some(next));
        true
    }

    /// The publisher is gone: what it held is to be cleared, and its next word needs a snapshot.
    pub fn lost(&mut self) {
        self.next = None;
    }

    /// What happened so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A subscriber could apply events before it has a snapshot, or twice those that the snapshot holds.
    #[test]
    fn a_snapshot_and_its_tail_are_applied_once() {
        let mut stream = Stream::new();
        assert_eq!(stream.event(1, 5), Verdict::Resync { from: None });
        assert!(stream.snapshot(1, 4));
        assert_eq!(stream.event(1, 3), Verdict::Drop, "the snapshot has it");
        assert_eq!(stream.event(1, 4), Verdict::Apply);
        assert_eq!(stream.event(1, 4), Verdict::Drop, "twice");
        assert_eq!(stream.event(1, 5), Verdict::Apply);
        assert_eq!(stream.tally(), Tally { applied: 2, repeated: 2, outdated: 0, gaps: 1 });
    }

    /// A missing number must stop the stream until the tail has come, and say where it begins.
    #[test]
    fn a_gap_asks_for_the_tail() {
        let mut stream = Stream::new();
        assert!(stream.snapshot(1, 0));
        assert_eq!(stream.event(1, 0), Verdict::Apply);
        assert_eq!(stream.event(1, 3), Verdict::Resync { from: Some(1) });
        assert_eq!(stream.event(1, 4), Verdict::Resync { from: Some(1) });
        assert_eq!(stream.event(1, 1), Verdict::Apply);
        assert!(stream.snapshot(1, 5), "a snapshot helps as well");
        assert_eq!(stream.event(1, 5), Verdict::Apply);
        assert!(!stream.snapshot(1, 4), "an older snapshot would take events back");
    }

    /// A late event of a process that is dead would put its blocks back; a new life's first event, with a
    /// number that happens to fit, would be added to what the old life held.
    #[test]
    fn lives_do_not_mix() {
        let mut stream = Stream::new();
        assert!(stream.snapshot(3, 7));
        assert_eq!(stream.event(2, 7), Verdict::Drop);
        assert!(!stream.snapshot(2, 100));
        assert_eq!(stream.event(4, 7), Verdict::Resync { from: None });
        assert_eq!(stream.event(3, 7), Verdict::Drop, "the old life is over");
        assert!(!stream.snapshot(3, 8));
        assert!(stream.snapshot(4, 8));
        assert_eq!(stream.event(4, 8), Verdict::Apply);
        stream.lost();
        assert_eq!(stream.event(4, 9), Verdict::Resync { from: None });
        assert!(stream.snapshot(4, u64::MAX));
        assert_eq!(stream.event(4, u64::MAX), Verdict::Apply);
        assert_eq!(stream.event(4, 0), Verdict::Resync { from: None }, "numbers do not wrap");
    }

    /// Any order of deliveries, with losses and repeats: what is applied is each number once and in order.
    #[test]
    fn whatever_arrives_each_event_is_applied_once_and_in_order() {
        for seed in 1..200u64 {
            let (mut state, mut applied) = (seed, Vec::new());
            let mut random = |below: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) % below
            };
            let mut stream = Stream::new();
            assert!(stream.snapshot(1, 0));
            for sent in 0..200u64 {
                let number = sent.saturating_sub(random(8));
                match stream.event(1, number) {
                    Verdict::Apply => applied.push(number),
                    Verdict::Drop => assert!(applied.contains(&number), "seed {seed}: {number} was lost"),
                    Verdict::Resync { from } => {
                        assert_eq!(from, Some(applied.len() as u64), "seed {seed}");
                        for again in applied.len() as u64..=number {
                            assert_eq!(stream.event(1, again), Verdict::Apply, "seed {seed}");
                            applied.push(again);
                        }
                    }
                }
            }
            assert!(applied.iter().copied().eq(0..applied.len() as u64), "seed {seed}");
        }
    }
}
