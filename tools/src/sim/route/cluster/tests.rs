//! The simulated cluster: times made by hand, late events, turns, and replays that repeat.

use super::*;

/// Requests as they are written in a trace, 100 tokens a block.
fn trace(lines: &[String]) -> Trace {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), lines.join("\n")).unwrap();
    Trace::read(file.path(), None, Some(100)).unwrap()
}

fn ask(at: u64, blocks: std::ops::Range<u64>, session: Option<u64>) -> String {
    let ids: Vec<u64> = blocks.collect();
    let session = session.map_or(String::new(), |session| format!(r#","session_id":{session}"#));
    let tokens = ids.len() * 100;
    format!(r#"{{"timestamp":{at},"input_length":{tokens},"output_length":40,"hash_ids":{ids:?}{session}}}"#)
}

fn setting(workers: u32) -> Setting {
    Setting {
        workers,
        private_blocks: 1000,
        pool_blocks: 0,
        private_rate: 1e5,
        pool_rate: 1e4,
        delay: 0,
        decode_rate: 40.0,
        closed_loop: false,
        speed: 1.0,
        starts: 1.0,
        temperature: 0.0,
        seed: 1,
        // A token takes a millisecond to compute, 10 us to load from memory and 100 us from the pool.
        profile: Profile { linear: 1e-3, quadratic: 0.0, rate: 1.0, bytes_per_token: 1 },
    }
}

fn times(trace: &Trace, setting: Setting, policy: Policy) -> Vec<f64> {
    let outcome = replay(trace, setting, policy, &ProgressBar::hidden());
    outcome.first_tokens.iter().map(|&time| float(time) / 1e6).collect()
}

fn close(found: &[f64], expected: &[f64]) {
    let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-4;
    assert!(found.len() == expected.len() && found.iter().zip(expected).all(near), "{found:?} {expected:?}");
}

/// Times that are off would make every comparison worthless: queue, load and compute of a few prompts are
/// compared with sums made by hand.
#[test]
fn queue_load_and_compute_add_up() {
    let prompts = trace(&[ask(0, 0..10, None), ask(100, 0..10, None), ask(5000, 0..12, None)]);
    // 1 s; the second waits 0.9 s and finds all but its last token; the third finds 1,000 of 1,200 tokens.
    let again = 0.9 + 0.01 + 0.001;
    close(&times(&prompts, setting(1), Policy::Estimate), &[0.21, again, 1.0]);
    // The router knows what the first worker is about to have: waiting is quicker than computing it elsewhere. The
    // third goes to the other one, which has shown nothing yet and is taken to be ten times as quick as it is.
    close(&times(&prompts, setting(2), Policy::Estimate), &[again, 1.0, 1.2]);
    let apart = trace(&[ask(0, 0..10, None), ask(100, 50..60, None)]);
    close(&times(&apart, setting(2), Policy::Estimate), &[1.0, 1.0]);
    close(&times(&apart, setting(1), Policy::Estimate), &[1.0, 1.9]);
}

/// A pool serves what another worker has computed, at its own rate; and only once that is done.
#[test]
fn the_pool_serves_other_workers() {
    let prompts = trace(&[ask(0, 0..10, None), ask(2000, 0..10, None), ask(2000, 0..10, None)]);
    let pooled = Setting { pool_blocks: 1000, ..setting(2) };
    let found = times(&prompts, pooled, Policy::RoundRobin);
    close(&found, &[0.011, 0.101, 1.0]);
    close(&times(&prompts, setting(2), Policy::RoundRobin), &[0.011, 1.0, 1.0]);
}

/// In a closed loop a turn must wait for the one before it and keep its think time, and starts move only
/// the first turns.
#[test]
fn turns_follow_each_other() {
    let lines = [ask(1000, 0..10, Some(1)), ask(1500, 0..20, Some(1)), ask(9000, 0..30, Some(1))];
    let prompts = trace(&lines);
    let closed = Setting { closed_loop: true, starts: 0.5, ..setting(1) };
    let outcome = replay(&prompts, closed, Policy::Estimate, &ProgressBar::hidden());
    // Each turn computes 10 new blocks. The first is answered after 1 + 1 s, the second comes then and takes
    // 1.01 s; 7.5 s after it, which is more than its answer, comes the third, and its answer takes 1 s.
    let last = 2.0 + 1.01 + 7.5 + 1.02 + 1.0;
    assert!((float(outcome.simulated) / 1e6 - last).abs() < 1e-3, "{}", outcome.simulated);
    close(&times(&prompts, closed, Policy::Estimate), &[1.0, 1.01, 1.02]);
}

/// The router must not know what nobody told it yet: with late events it sends a known prompt away from a
/// short queue that would have been worth waiting in.
#[test]
fn late_events_are_late() {
    let lines = [ask(0, 0..10, None), ask(4100, 50..53, None), ask(4200, 0..10, None)];
    let prompts = trace(&lines);
    let known = times(&prompts, setting(2), Policy::Estimate);
    assert!(known[0] < 0.25, "{known:?}");
    let late = times(&prompts, Setting { delay: 5_000_000, ..setting(2) }, Policy::Estimate);
    assert!(late.iter().sum::<f64>() > known.iter().sum::<f64>() + 0.5, "{late:?} {known:?}");
}

/// What the router has sent to a worker it need not be told: a prompt behind another one with the same beginning
/// goes where that is computed, and one that comes just after it too, although no event has come.
#[test]
fn what_was_sent_is_known() {
    let lines = [ask(0, 0..10, None), ask(10, 20..23, None), ask(20, 0..10, None), ask(1500, 0..10, None)];
    let late = Setting { delay: 5_000_000, ..setting(2) };
    let found = times(&trace(&lines), late, Policy::Estimate);
    // The third waits for the first, 0.98 s, and loads; the last one loads at once.
    close(&found, &[0.011, 0.3, 0.991, 1.0]);
}

/// The bound must be one: nobody waits, nothing is computed twice, and nothing is there before it was computed.
#[test]
fn the_ideal_is_a_bound() {
    let lines = [ask(0, 0..10, None), ask(0, 20..30, None), ask(500, 0..10, None), ask(1100, 20..31, None)];
    let prompts = trace(&lines);
    close(&times(&prompts, setting(1), Policy::Ideal), &[0.11, 1.0, 1.0, 1.0]);
    let line = |n: u64| ask(n * 137, n % 7 * 100..n % 7 * 100 + 3 + n % 11, None);
    let prompts = trace(&(0..400).map(line).collect::<Vec<_>>());
    let mean = |policy| replay(&prompts, setting(4), policy, &ProgressBar::hidden()).mean();
    let bound = mean(Policy::Ideal);
    for policy in [Policy::LeastLoad, Policy::Blocks1, Policy::Blocks2, Policy::Hash, Policy::Estimate] {
        assert!(mean(policy) >= bound, "{}: {} against {bound}", policy.name(), mean(policy));
    }
}

/// Two replays of one seed must be the same to the last bit, under every policy, and lose no request.
#[test]
fn replays_repeat() {
    let line = |n: u64| ask(n * 137, n % 7 * 100..n % 7 * 100 + 3 + n % 11, None);
    let prompts = trace(&(0..400).map(line).collect::<Vec<_>>());
    let small =
        Setting { private_blocks: 40, pool_blocks: 60, temperature: 0.1, delay: 300_000, ..setting(4) };
    for policy in [
        Policy::Random,
        Policy::RoundRobin,
        Policy::LeastLoad,
        Policy::Hash,
        Policy::Blocks1,
        Policy::Blocks2,
        Policy::Dynamo,
        Policy::Estimate,
        Policy::Ideal,
    ] {
        let run = || replay(&prompts, small, policy, &ProgressBar::hidden());
        let first = run();
        assert_eq!(first.first_tokens.len(), 400, "{}", policy.name());
        assert_eq!(first, run(), "{}", policy.name());
    }
}

/// The load that is asked for must be the load that comes.
#[test]
fn speed_gives_the_wanted_utilisation() {
    let prompts = trace(&(0..100).map(|n| ask(n * 1000, n * 10..n * 10 + 5, None)).collect::<Vec<_>>());
    let profile = setting(2).profile;
    // 50 s of work in 99 s for two workers.
    let speed = speed_for(&prompts, 2, &profile, 0.5);
    assert!((speed - 0.5 * 99.0 * 2.0 / 50.0).abs() < 1e-6, "{speed}");
}
