//! Reports, failures and work in flight of a fleet.

use super::*;

fn load(name: &str, pid: u32) -> WorkerLoad {
    WorkerLoad {
        name: name.to_owned(),
        role: WorkerRole::Decode.into(),
        endpoint: "http://127.0.0.1:1".to_owned(),
        pid,
        space: Some(v1::SpaceManifest::default()),
        requests_max: 2,
        ..WorkerLoad::default()
    }
}

fn reports(incarnation: u64, workers: &[WorkerLoad]) -> v1::ObserveResponse {
    v1::ObserveResponse { incarnation, workers: workers.to_vec(), pressures: Vec::new() }
}

fn names(fleet: &Fleet, now: Instant) -> Vec<String> {
    fleet.view(now, |_| true).decode.into_iter().map(|worker| worker.load.name).collect()
}

/// A daemon that restarts knows no worker for a moment; dropping them all would answer 503 to
/// everybody although each worker is alive. One that the same daemon forgot is really gone.
#[tokio::test]
async fn workers_survive_a_restart_of_the_daemon() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    fleet.observe(&reports(1, &[load("a", 1), load("b", 2)]), now);
    fleet.observe(&reports(1, &[load("a", 1)]), now);
    assert_eq!(names(&fleet, now), ["a"]);
    fleet.observe(&reports(2, &[]), now);
    fleet.observe(&reports(2, &[]), now + Duration::from_secs(1));
    assert_eq!(names(&fleet, now), ["a"]);
    fleet.observe(&reports(2, &[]), now + ABSENT_MAX);
    assert!(names(&fleet, now).is_empty());
    // Without the daemon's word, the first failure is the last.
    fleet.observe(&reports(2, &[load("a", 1)]), now);
    fleet.observe(&reports(3, &[]), now);
    let worker = fleet.view(now, |_| true).decode.remove(0);
    fleet.failed(&worker, now);
    assert!(fleet.loads().is_empty());
}

/// A worker that fails must be left alone for a growing while, and a successor under the same name
/// must not inherit that, nor the work in flight of the dead one.
#[tokio::test]
async fn failures_suspend_one_process_only() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    fleet.observe(&reports(1, &[load("a", 1)]), now);
    let worker = fleet.view(now, |_| true).decode.remove(0);
    let _in_flight = fleet.begin(&worker, 100, 1.0, Arc::new([]));
    fleet.failed(&worker, now);
    fleet.failed(&worker, now);
    assert!(names(&fleet, now + SUSPEND).is_empty());
    assert_eq!(names(&fleet, now + SUSPEND * 2), ["a"]);
    fleet.observe(&reports(1, &[load("a", 2)]), now);
    fleet.failed(&worker, now);
    let successor = fleet.view(now, |_| true).decode.remove(0);
    assert_eq!((successor.candidate.requests, successor.candidate.pending_tokens), (0, 0));
}

/// A worker that registers twice, as a new stream does before the old one has ended, would be sent twice its share, or
/// forget what it has in flight; of two processes under one name the last counts.
#[tokio::test]
async fn a_worker_that_registers_twice_is_one() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    fleet.observe(&reports(1, &[load("a", 1)]), now);
    let view = || fleet.view(now, |_| true).decode;
    let _in_flight = fleet.begin(&view()[0], 100, 1.0, Arc::new([]));
    fleet.observe(&reports(1, &[load("a", 1), load("b", 2), load("a", 1)]), now);
    assert_eq!(names(&fleet, now), ["a", "b"]);
    assert_eq!(view()[0].candidate.pending_tokens, 100, "work in flight is still counted");
    fleet.observe(&reports(1, &[load("a", 1), load("a", 3)]), now);
    assert_eq!(names(&fleet, now), ["a"]);
    assert_eq!((view()[0].load.pid, view()[0].candidate.pending_tokens), (3, 0));
}

/// Reports lag: two requests sent within one report must count at once, and cease to count when they end.
#[tokio::test]
async fn work_in_flight_counts_before_it_is_reported() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    let reported = WorkerLoad { active_requests: 1, pending_tokens: 30, ..load("a", 1) };
    fleet.observe(&reports(1, &[reported]), now);
    let view = || fleet.view(now, |_| true).decode.remove(0);
    let mut first = fleet.begin(&view(), 100, 2.0, Arc::new([]));
    let second = fleet.begin(&view(), 50, 1.0, Arc::new([]));
    assert_eq!((view().candidate.requests, view().candidate.pending_tokens), (2, 150));
    assert!(view().is_filled && view().candidate.is_full());
    first.computed();
    drop(second);
    assert_eq!((view().candidate.requests, view().candidate.pending_tokens), (1, 30));
    let mut changes = fleet.changes();
    drop(first);
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
}

/// A draining worker, one of another model, and one with a broken address take nothing new.
#[tokio::test]
async fn unfit_workers_are_not_offered() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    let draining = WorkerLoad { draining: true, ..load("a", 1) };
    let broken = WorkerLoad { endpoint: "not an address".to_owned(), ..load("b", 2) };
    let foreign = WorkerLoad { model_path: "/other".to_owned(), ..load("c", 3) };
    fleet.observe(&reports(1, &[draining, broken, foreign]), now);
    assert!(fleet.view(now, |load| load.model_path.is_empty()).decode.is_empty());
    assert_eq!(fleet.loads().len(), 2);
}
