//! Placement: each term by itself, and the choices that follow from them.

use super::source::{Link, Run, Tier};
use super::*;

const ATTENTION: f64 = 4096.0;

fn idle() -> Candidate {
    Candidate {
        view: 0,
        space: 0,
        queued_seconds: 0.0,
        pending_tokens: 0,
        requests: 0,
        requests_max: 4,
        decodes: Decodes::Here,
        prefill: Prefill::of_rate(1000.0),
        decode_rate: 50.0,
    }
}

fn helper() -> Candidate {
    Candidate { decodes: Decodes::Elsewhere, ..idle() }
}

/// So many tokens are there, and all of them take so long.
fn cached(tokens: u64, seconds: f64, tier: Tier) -> View {
    let link = Link {
        holder: 0,
        tier,
        latency_seconds: 0.0,
        seconds_per_token: seconds / source::float(tokens),
        queued_seconds: 0.0,
    };
    View { links: vec![link], runs: vec![Run { link: 0, begin: 0, end: tokens }] }
}

fn first(tokens: u64, views: &[View], prefill: &[Candidate], decode: &[Candidate]) -> Plan {
    choose(tokens, views, prefill, decode, Ties::First).unwrap()
}

/// A term that is lost, counted twice, or taken from the wrong worker would still look like an estimate:
/// each is compared with what it must be.
#[test]
fn every_term_is_what_it_says() {
    let views = [cached(600, 0.006, Tier::Pinned)];
    let worker = Candidate { queued_seconds: 0.25, requests: 2, ..idle() };
    let plan = first(1000, &views, &[], std::slice::from_ref(&worker));
    let estimate = plan.estimate;
    let compute = 0.4 * (1.0 + (600.0 + 200.0) / ATTENTION);
    assert!((estimate.queue - 0.25).abs() < 1e-9);
    assert!((estimate.load - 0.006).abs() < 1e-9);
    assert!((estimate.prefill - compute).abs() < 1e-9, "{estimate:?}");
    assert!((estimate.harm - compute * HARM * 3.0).abs() < 1e-9);
    assert!((estimate.first_token() - 0.256 - compute).abs() < 1e-9);
    assert!((estimate.cost() - estimate.first_token() - estimate.harm).abs() < 1e-9);
    assert_eq!((estimate.loaded_tokens, estimate.cached_tokens, estimate.missing_tokens), (600, 600, 400));
    let waits = Candidate { queued_seconds: 9.0, ..worker };
    let ways = explain(1000, &views, &[helper()], &[waits]);
    assert_eq!(ways[0].prefill, Some(0));
    let separate = ways[0].estimate;
    assert!((separate.handover - (9.0 - 0.006 - compute) - HANDOVER_SECONDS).abs() < 1e-9, "{separate:?}");
    assert!(separate.harm.abs() < 1e-9 && separate.queue.abs() < 1e-9);
    assert!(ways[0].estimate.cost() <= ways[1].estimate.cost());
}

/// The worker's own count of tokens and the router's account of seconds are of the same queue: the larger
/// counts, not both.
#[test]
fn two_accounts_of_one_queue_are_not_added() {
    let behind = Candidate { pending_tokens: 500, queued_seconds: 0.1, ..idle() };
    let reported = Prefill::of_rate(1000.0).seconds(0.0, 500.0);
    assert!((behind.queue_seconds() - reported).abs() < 1e-9);
    let known = Candidate { queued_seconds: 3.0, ..behind };
    assert!((known.queue_seconds() - 3.0).abs() < 1e-9);
    let full = Candidate { requests: 5, ..idle() };
    assert!((full.queue_seconds() - 2.0 * DECODE_TOKENS / 50.0).abs() < 1e-9);
}

/// A prompt that is nearly all cached must not pay for a second worker.
#[test]
fn short_and_cached_prompts_go_straight_to_decode() {
    let busy = [Candidate { requests: 3, ..idle() }];
    assert_eq!(first(40, &[View::default()], &[helper()], &busy).prefill, None);
    let plan = first(1000, &[cached(992, 0.0001, Tier::Pinned)], &[helper()], &busy);
    assert_eq!((plan.prefill, plan.estimate.missing_tokens), (None, 8));
}

/// A long prompt must not stop running decodes when a prefill worker is free,
/// and must not wait for a prefill worker whose queue is longer than the harm.
#[test]
fn long_prompts_prefer_a_prefill_worker_unless_it_is_far_behind() {
    let busy = [Candidate { requests: 2, ..idle() }];
    assert_eq!(first(1000, &[View::default()], &[helper()], &busy).prefill, Some(0));
    let behind = Candidate { pending_tokens: 8000, ..helper() };
    assert_eq!(first(1000, &[View::default()], &[behind], &busy).prefill, None);
}

/// A disk that needs longer than a computation must count: the worker without a copy wins when it computes
/// faster than the other fetches, and even the worker with the copy computes.
#[test]
fn slow_fetches_count_in_seconds() {
    let other = Candidate { view: 1, space: 1, prefill: Prefill::of_rate(1001.0), ..idle() };
    let slow = [cached(512, 40.0, Tier::Nvme), View::default()];
    let plan = first(600, &slow, &[], &[idle(), other.clone()]);
    assert_eq!((plan.decode, plan.estimate.loaded_tokens), (1, 0));
    let alone = first(600, &slow, &[], &[idle()]);
    assert_eq!((alone.estimate.cached_tokens, alone.estimate.loaded_tokens), (512, 0));
    assert!(alone.fetches.is_empty());
    let quick = [cached(512, 0.002, Tier::Nvme), View::default()];
    let plan = first(600, &quick, &[], &[idle(), other]);
    assert_eq!((plan.decode, plan.prefetches().count()), (0, 1));
    assert_eq!((plan.fetches[0].begin, plan.fetches[0].end), (0, 512));
}

/// Where the blocks are wins until the queue there is longer than computing them again: affinity without
/// a rule for it.
#[test]
fn sessions_stay_until_it_is_quicker_elsewhere() {
    let views = [cached(8000, 0.01, Tier::Pinned), View::default()];
    let away = Candidate { view: 1, ..idle() };
    let compute = Prefill::of_rate(1000.0).seconds(0.0, 8000.0);
    for (queued_seconds, expected) in [(0.0, 0), (compute * 0.9, 0), (compute * 1.1, 1)] {
        let home = Candidate { queued_seconds, decodes: Decodes::Elsewhere, ..idle() };
        let away = Candidate { decodes: Decodes::Elsewhere, ..away.clone() };
        assert_eq!(first(8200, &views, &[], &[home, away]).decode, expected, "{queued_seconds}");
    }
}

/// Load must be spread: of two equal workers the one with less to do is taken, and a full one only when
/// there is no other.
#[test]
fn the_queue_decides_between_equals() {
    let pending = Candidate { pending_tokens: 500, requests: 1, ..idle() };
    assert_eq!(first(100, &[], &[], &[pending, idle()]).decode, 1);
    let full = Candidate { requests: 4, prefill: Prefill::of_rate(1e6), ..idle() };
    let slow = Candidate { prefill: Prefill::of_rate(10.0), ..idle() };
    assert_eq!(first(100, &[], &[], &[full.clone(), slow]).decode, 1);
    assert_eq!(first(100, &[], &[], &[full]).decode, 0);
    let one = Candidate { requests: 1, decodes: Decodes::Elsewhere, ..idle() };
    let none = Candidate { decodes: Decodes::Elsewhere, ..idle() };
    assert_eq!(first(1, &[], &[], &[one, none]).decode, 1);
}

/// A prefill worker of another space seals blocks that the decode worker cannot read; using it would
/// compute everything twice.
#[test]
fn prefill_and_decode_share_a_space() {
    let foreign = Candidate { space: 1, prefill: Prefill::of_rate(1e6), ..helper() };
    let busy = Candidate { requests: 3, ..idle() };
    assert_eq!(first(1000, &[], &[foreign], &[busy]).prefill, None);
}

/// Drawn ties must reach every equal worker, spare a dear one, and never take a full one while another
/// has room; a cold draw must be the best one.
#[test]
fn ties_are_drawn_by_temperature() {
    let full = Candidate { requests: 4, ..idle() };
    let dear = Candidate { queued_seconds: 60.0, ..idle() };
    let workers = [full, idle(), dear, idle()];
    let mut chosen = [0; 4];
    for step in 0..1000 {
        let ties = Ties::Drawn { temperature: 0.1, random: f64::from(step) / 1000.0 };
        chosen[choose(100, &[], &[], &workers, ties).unwrap().decode] += 1;
    }
    assert_eq!((chosen[0], chosen[2]), (0, 0), "{chosen:?}");
    assert!(chosen[1] > 400 && chosen[3] > 400, "{chosen:?}");
    let near = [Candidate { queued_seconds: 0.01, ..idle() }, idle()];
    let cold = Ties::Drawn { temperature: 1e-9, random: 0.0 };
    assert_eq!(choose(100, &[], &[], &near, cold).unwrap().decode, 1);
}

/// No worker, no tokens, or a view that is not there must not end in a panic.
#[test]
fn nothing_is_no_panic() {
    assert!(choose(10, &[], &[idle()], &[], Ties::First).is_none());
    assert_eq!(first(0, &[], &[], &[idle()]).estimate.missing_tokens, 0);
    let lost = Candidate { view: 7, ..idle() };
    assert_eq!(first(10_000_000, &[], &[], &[lost]).estimate.missing_tokens, 10_000_000);
}
