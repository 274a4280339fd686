//! Which daemon each worker works with.
//!
//! A worker reports to the daemon whose blocks it reads and writes; only those are
//! loaded without being computed. A space on two daemons is therefore two places
//! for blocks, and a prefill worker helps only decode workers of its own daemon.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use terrace_proto::v1::ObserveResponse;

use crate::fleet::Worker;
use crate::place::Candidate;

/// Names that are remembered after their last report.
const KEPT_MAX: usize = 1024;

/// Daemons by worker.
#[derive(Debug, Default)]
pub struct Homes {
    by_worker: Mutex<BTreeMap<String, usize>>,
}

impl Homes {
    /// All daemons' reports as one; they and their names are in the same order. Workers of the second daemon
    /// and of later ones get the daemon's name behind theirs, so that equal names do not meet.
    pub fn join(&self, reports: &[ObserveResponse], names: &[String]) -> ObserveResponse {
        let mut joined = ObserveResponse::default();
        let mut homes = BTreeMap::new();
        for (daemon, (report, name)) in reports.iter().zip(names).enumerate() {
            // A daemon that begins a new life changes the sum.
            joined.incarnation = joined.incarnation.wrapping_add(report.incarnation);
            joined.pressures.extend(report.pressures.iter().cloned());
            for load in &report.workers {
                let mut load = load.clone();
                if daemon > 0 {
                    load.name = format!("{}@{name}", load.name);
                }
                homes.insert(load.name.clone(), daemon);
                joined.workers.push(load);
            }
        }
        // A worker that is no longer named may still be in use: its daemon is kept for a while.
        let mut known = self.lock();
        if known.len() > KEPT_MAX {
            known.clear();
        }
        known.append(&mut homes);
        joined
    }

    /// Workers for the placement, with the views of `daemons` daemons for each space, one after the other.
    pub fn candidates<'a>(
        &self,
        workers: impl IntoIterator<Item = &'a Worker>,
        daemons: usize,
    ) -> Vec<Candidate> {
        let homes = self.lock();
        workers.into_iter().map(|worker| placed(&homes, worker, daemons)).collect()
    }

    /// One of [`Homes::candidates`].
    pub fn candidate(&self, worker: &Worker, daemons: usize) -> Candidate {
        placed(&self.lock(), worker, daemons)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        // The map is replaced or extended as a whole.
        self.by_worker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worker for the placement, with the view of its own daemon.
fn placed(homes: &BTreeMap<String, usize>, worker: &Worker, daemons: usize) -> Candidate {
    let daemon = homes.get(&worker.load.name).copied().unwrap_or(0).min(daemons.saturating_sub(1));
    let space = worker.candidate.space * daemons + daemon;
    Candidate { view: space, space, ..worker.candidate.clone() }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use terrace_proto::v1::{SpaceManifest, WorkerLoad, WorkerRole};

    use super::*;
    use crate::fleet::Fleet;

    fn report(incarnation: u64, names: &[&str]) -> ObserveResponse {
        let worker = |name: &&str| WorkerLoad {
            name: (*name).to_owned(),
            role: WorkerRole::Decode.into(),
            endpoint: "http://127.0.0.1:1".to_owned(),
            space: Some(SpaceManifest::default()),
            ..WorkerLoad::default()
        };
        ObserveResponse { incarnation, workers: names.iter().map(worker).collect(), ..Default::default() }
    }

    /// Two daemons with a worker of the same name would share one entry, and blocks of one would be credited to a
    /// worker of the other: each must keep its own view.
    #[tokio::test]
    async fn equal_names_stay_apart_and_see_their_own_daemon() {
        let (homes, fleet) = (Homes::default(), Fleet::default());
        let names = ["http://a:1".to_owned(), "http://b:1".to_owned()];
        let joined = homes.join(&[report(3, &["decode-0"]), report(4, &["decode-0", "decode-1"])], &names);
        assert_eq!(joined.incarnation, 7);
        fleet.observe(&joined, Instant::now());
        let workers = fleet.view(Instant::now(), |_| true).decode;
        let candidates = homes.candidates(&workers, 2);
        let seen: Vec<_> = workers
            .iter()
            .zip(&candidates)
            .map(|(worker, candidate)| (worker.load.name.as_str(), candidate.view, candidate.space))
            .collect();
        let expected = [("decode-0", 0, 0), ("decode-0@http://b:1", 1, 1), ("decode-1@http://b:1", 1, 1)];
        assert_eq!(seen, expected);
        // With one daemon nothing is renamed, and a worker that nobody named is at the first.
        let alone = homes.join(&[report(3, &["decode-0"])], &names[..1]);
        assert_eq!((alone.workers[0].name.as_str(), alone.incarnation), ("decode-0", 3));
        assert_eq!(homes.candidates(&workers[..1], 1)[0].view, 0);
    }
}
