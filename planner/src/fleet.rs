//! Which named workers run, start, stop or wait for their next attempt.
//!
//! Pure: the wanted number, the time and the exits go in, actions come out. A
//! worker that dies unasked is started again after a pause that doubles with
//! each quick death; one that does not stop when asked is killed.

use std::time::Duration;

use crate::size::Role;

/// Longest a worker may take to drain before it is killed.
pub const STOP_TIME_MAX: Duration = Duration::from_secs(12);
/// First pause before a dead worker is started again.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A worker that ran this long is healthy: its next death starts the pauses over.
const HEALTHY: Duration = Duration::from_secs(30);

/// Something to do to one worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start it.
    Start(String),
    /// Ask it to drain and exit.
    Stop(String),
    /// End it now.
    Kill(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Absent,
    Running { since: Duration },
    Stopping { kill_at: Duration },
    Killed,
    Pausing { until: Duration },
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    phase: Phase,
    /// Deaths in a row without a healthy run.
    deaths: u32,
}

/// All workers of one role. Slot `i` is the worker named `ROLE-i`.
#[derive(Debug)]
pub struct Fleet {
    role: Role,
    slots: Vec<Slot>,
}

impl Fleet {
    /// A fleet of at most `max` workers, none running.
    pub fn new(role: Role, max: u32) -> Self {
        let slots = (0..max).map(|_| Slot { phase: Phase::Absent, deaths: 0 }).collect();
        Self { role, slots }
    }

    /// Workers that run and are not being stopped.
    pub fn running(&self) -> u32 {
        let running = self.slots.iter().filter(|slot| matches!(slot.phase, Phase::Running { .. }));
        running.map(|_| 1).sum()
    }

    /// No worker runs or is being stopped.
    pub fn is_empty(&self) -> bool {
        self.slots.iter().all(|slot| matches!(slot.phase, Phase::Absent | Phase::Pausing { .. }))
    }

    /// Moves towards `wanted` workers: the first slots run, the others do not.
    pub fn reconcile(&mut self, wanted: u32, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let name = format!("{}-{index}", self.role);
            let run = u32::try_from(index).is_ok_and(|index| index < wanted);
            match slot.phase {
                Phase::Absent if run => {
                    slot.phase = Phase::Running { since: now };
                    actions.push(Action::Start(name));
                }
                Phase::Pausing { until } if run && now >= until => {
                    slot.phase = Phase::Running { since: now };
                    actions.push(Action::Start(name));
                }
                Phase::Pausing { .. } if !run => *slot = Slot { phase: Phase::Absent, deaths: 0 },
                Phase::Running { .. } if !run => {
                    slot.phase = Phase::Stopping { kill_at: now.saturating_add(STOP_TIME_MAX) };
                    actions.push(Action::Stop(name));
                }
                Phase::Stopping { kill_at } if now >= kill_at => {
                    slot.phase = Phase::Killed;
                    actions.push(Action::Kill(name));
                }
                Phase::Absent
                | Phase::Running { .. }
                | Phase::Stopping { .. }
                | Phase::Killed
                | Phase::Pausing { .. } => {}
            }
        }
        actions
    }

    /// Takes note that a worker is gone (or could not be started). Answers the
    /// pause before it is started again; `None` if it was meant to go, or is
    /// none of ours.
    pub fn exited(&mut self, name: &str, now: Duration) -> Option<Duration> {
        let index: usize = name.strip_prefix(self.role.name())?.strip_prefix('-')?.parse().ok()?;
        let slot = self.slots.get_mut(index)?;
        match slot.phase {
            Phase::Running { since } => {
                if now.saturating_sub(since) >= HEALTHY {
                    slot.deaths = 0;
                }
                let pause = PAUSE_MIN.saturating_mul(1 << slot.deaths.min(8)).min(PAUSE_MAX);
                slot.deaths = slot.deaths.saturating_add(1);
                slot.phase = Phase::Pausing { until: now.saturating_add(pause) };
                Some(pause)
            }
            Phase::Stopping { .. } | Phase::Killed => {
                *slot = Slot { phase: Phase::Absent, deaths: 0 };
                None
            }
            Phase::Absent | Phase::Pausing { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn start(name: &str) -> Action {
        Action::Start(name.to_owned())
    }

    /// A worker killed from outside must come back, but a crash loop must not
    /// burn the machine: each quick death doubles the pause.
    #[test]
    fn a_dead_worker_comes_back_with_growing_pauses() {
        let mut fleet = Fleet::new(Role::Prefill, 2);
        assert_eq!(fleet.reconcile(1, at(0)), [start("prefill-0")]);
        assert_eq!(fleet.exited("prefill-0", at(10)), Some(at(500)));
        assert_eq!(fleet.reconcile(1, at(509)), []);
        assert_eq!(fleet.reconcile(1, at(510)), [start("prefill-0")]);
        assert_eq!(fleet.exited("prefill-0", at(600)), Some(at(1_000)));
        let mut now = 0;
        for _ in 0..20 {
            now += 40_000;
            fleet.reconcile(1, at(now));
            assert!(fleet.exited("prefill-0", at(now + 1)).unwrap() <= PAUSE_MAX);
        }
        fleet.reconcile(1, at(now + 40_000));
        assert_eq!(fleet.exited("prefill-0", at(now + 100_000)), Some(at(500)), "a healthy run starts over");
    }

    /// Scaling down must drain by a polite stop, kill only what ignores it, and
    /// not start the slot again while the old process lives.
    #[test]
    fn scaling_down_drains_then_kills() {
        let mut fleet = Fleet::new(Role::Decode, 3);
        assert_eq!(fleet.reconcile(2, at(0)).len(), 2);
        assert_eq!(fleet.reconcile(1, at(100)), [Action::Stop("decode-1".to_owned())]);
        assert_eq!(fleet.running(), 1);
        assert_eq!(fleet.reconcile(2, at(200)), [], "the old process is still draining");
        assert_eq!(fleet.reconcile(1, at(100) + STOP_TIME_MAX), [Action::Kill("decode-1".to_owned())]);
        assert_eq!(fleet.reconcile(1, at(200) + STOP_TIME_MAX), []);
        assert!(!fleet.is_empty());
        assert_eq!(fleet.exited("decode-1", at(30_000)), None);
        assert_eq!(fleet.reconcile(2, at(30_001)), [start("decode-1")]);
    }

    /// Exits of unknown names (garbage, the other role, past the end) must be ignored.
    #[test]
    fn foreign_exits_are_ignored() {
        let mut fleet = Fleet::new(Role::Decode, 1);
        fleet.reconcile(1, at(0));
        for name in ["prefill-0", "decode-1", "decode-", "decode-x", ""] {
            assert_eq!(fleet.exited(name, at(1)), None);
        }
        assert_eq!(fleet.running(), 1);
    }
}
