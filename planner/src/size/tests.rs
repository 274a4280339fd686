//! Tests of the sizing decisions.

use super::*;

fn policy() -> Policy {
    Policy {
        prefill: Bounds { min: 1, max: 4 },
        decode: Bounds { min: 1, max: 2 },
        target: Duration::from_secs(2),
        hold: Duration::from_millis(500),
        settle: Duration::from_secs(5),
        quiet: Duration::from_secs(60),
        rate_assumed: 300.0,
    }
}

fn backlog(tokens: u64) -> View {
    let pressure = PressureView { missing_tokens: tokens, ..PressureView::default() };
    View { pressure, ..View::default() }
}

/// Runs `view` for `seconds` at four looks a second and collects the decisions on prefill.
fn play(view: &View, from: u64, seconds: u64, state: &mut State, policy: &Policy) -> Vec<(u32, u32)> {
    (from * 4..(from + seconds) * 4)
        .flat_map(|quarter| decide(view, Duration::from_millis(quarter * 250), state, policy))
        .filter(|decision| decision.role == Role::Prefill)
        .map(|decision| (decision.from, decision.to))
        .collect()
}

/// The first look must ask for the minimum at once, or nothing would ever start.
#[test]
fn starts_at_the_minimum() {
    let mut state = State::default();
    let decisions = decide(&View::default(), Duration::ZERO, &mut state, &policy());
    assert_eq!(decisions.len(), 2);
    assert_eq!((state.wanted(Role::Prefill), state.wanted(Role::Decode)), (1, 1));
}

/// A step load could make the fleet swing up and down. One step up and, long
/// after the load is gone, one step down are all we allow.
#[test]
fn a_step_load_makes_one_step_each_way() {
    let (mut state, policy) = (State::default(), policy());
    assert_eq!(play(&View::default(), 0, 10, &mut state, &policy), [(0, 1)]);
    assert_eq!(play(&backlog(1_500), 10, 30, &mut state, &policy), [(1, 3)]);
    assert_eq!(play(&View::default(), 40, 55, &mut state, &policy), []);
    assert_eq!(play(&View::default(), 95, 300, &mut state, &policy), [(3, 1)]);
}

/// A load that comes and goes every few seconds could start and stop workers
/// all the time. The peak of the quiet period must hold them.
#[test]
fn a_pulsing_load_keeps_its_workers() {
    let (mut state, policy) = (State::default(), policy());
    play(&View::default(), 0, 10, &mut state, &policy);
    let mut changes = Vec::new();
    for pulse in 0..20 {
        changes.extend(play(&backlog(1_100), 10 + pulse * 10, 5, &mut state, &policy));
        changes.extend(play(&View::default(), 15 + pulse * 10, 5, &mut state, &policy));
    }
    assert_eq!(changes, [(1, 2)]);
}

/// Absurd reports (a huge backlog, NaN rates) must stay within the bounds.
#[test]
fn bounds_hold_whatever_is_reported() {
    let (mut state, policy) = (State::default(), policy());
    play(&View::default(), 0, 10, &mut state, &policy);
    play(&backlog(u64::MAX), 10, 20, &mut state, &policy);
    assert_eq!(state.wanted(Role::Prefill), 4);
    let load = v1::WorkerLoad {
        role: v1::WorkerRole::Prefill.into(),
        prefill_tokens_per_second: f64::NAN,
        pending_tokens: u64::MAX,
        ..v1::WorkerLoad::default()
    };
    let reports = v1::ObserveResponse { workers: vec![load.clone(), load], ..v1::ObserveResponse::default() };
    let view = View::from_reports(&reports);
    assert_eq!((view.prefill.workers, view.prefill.prefill_rate), (2, 0.0));
    play(&view, 30, 20, &mut state, &policy);
    assert_eq!(state.wanted(Role::Prefill), 4);
    play(&View::default(), 50, 300, &mut state, &policy);
    assert_eq!(state.wanted(Role::Prefill), 1);
}

/// A single short spike must not start a worker that takes seconds to load.
#[test]
fn a_spike_shorter_than_the_hold_is_ignored() {
    let (mut state, policy) = (State::default(), policy());
    play(&View::default(), 0, 10, &mut state, &policy);
    assert_eq!(decide(&backlog(9_000), Duration::from_secs(20), &mut state, &policy), []);
    assert_eq!(decide(&View::default(), Duration::from_millis(20_250), &mut state, &policy), []);
    assert_eq!(decide(&backlog(9_000), Duration::from_millis(20_750), &mut state, &policy), []);
}

/// The reason is what an operator reads: it must carry the figures.
#[test]
fn the_reason_carries_the_figures() {
    let (mut state, mut policy) = (State::default(), policy());
    policy.prefill.max = 2;
    decide(&View::default(), Duration::ZERO, &mut state, &policy);
    let mut view = backlog(3_100);
    view.prefill.prefill_rate = 316.0;
    decide(&view, Duration::from_secs(9), &mut state, &policy);
    let decisions = decide(&view, Duration::from_secs(10), &mut state, &policy);
    assert_eq!(
        decisions[0].to_string(),
        "prefill 1 -> 2: 3,100 missing tokens queued, 9.8 s at 316 tokens/s; target 2.0 s"
    );
}

/// Decode workers follow requests, not tokens; one more request than fits needs one more worker.
#[test]
fn decode_follows_requests() {
    let (mut state, policy) = (State::default(), policy());
    let mut view = View::default();
    view.decode.requests_max = 4;
    view.decode.requests = 4;
    for second in 0..20 {
        decide(&view, Duration::from_secs(second), &mut state, &policy);
    }
    assert_eq!(state.wanted(Role::Decode), 1);
    view.decode.requests = 5;
    for second in 20..40 {
        decide(&view, Duration::from_secs(second), &mut state, &policy);
    }
    assert_eq!(state.wanted(Role::Decode), 2);
}
