//! The node with a clock: times that can be worked out by hand, and its consistency.

use terrace_core::{Admission, HEADER_PAGE_BYTES, Policy};

use super::super::node::DeviceModel;
use super::super::reference::tests::{conversations, trace_of};
use super::*;

const BLOCK_BYTES: u64 = 16 * 1024;
const FRAME_BYTES: u64 = BLOCK_BYTES + HEADER_PAGE_BYTES;

/// A second a token, 16 tokens and 16 KiB a block.
const SERVICE: Service = Service {
    workers: 1,
    link_rate: 1e6,
    decode_rate: 10.0,
    closed_loop: false,
    speed: 1.0,
    profile: Profile { linear: 1.0, quadratic: 0.0, rate: 1.0, bytes_per_token: 1024 },
};

fn hardware(pinned: u64, nvme: u32) -> Hardware {
    Hardware {
        block_bytes: BLOCK_BYTES,
        chunk_bytes: FRAME_BYTES + HEADER_PAGE_BYTES,
        pinned_chunks: pinned,
        device_slots: if nvme == 0 { Vec::new() } else { vec![nvme / 2; 2] },
        device: DeviceModel { read_rate: 1e5, write_rate: 5e4, latency: 250 },
        memory_rate: 1e9,
        block_tokens: 16,
        frames_ready: 0,
        clients: 4,
        blocks_per_request: 1000,
        patience: 30_000_000,
        policy: Policy::Lru,
        admission: Admission::All,
        cost: SERVICE.profile.block_cost(16),
    }
}

fn line(at: u64, blocks: &[u64], session: u64) -> String {
    format!(
        "{{\"timestamp\": {at}, \"input_length\": {}, \"output_length\": 20, \"hash_ids\": {blocks:?}, \"session_id\": {session}}}\n",
        blocks.len() * 16
    )
}

/// Times to first token in the order of the trace; they are sorted in the outcome.
fn times(text: &str, hardware: Hardware, service: Service) -> Vec<u64> {
    replay(&trace_of(text), hardware, service, &ProgressBar::hidden()).first_tokens
}

/// Waiting, loading or computing could be counted twice, or not at all.
#[test]
fn a_hit_costs_its_load_and_a_miss_its_prefill() {
    let second = 1_000_000;
    // 32 tokens are computed; then 32,768 bytes are loaded at 1 MB/s and one token is computed.
    let twice = line(0, &[1, 2], 0) + &line(100_000, &[1, 2], 1);
    assert_eq!(times(&twice, hardware(10, 0), SERVICE), [32_768 + second, 32 * second]);
    // The second comes 10 s after the first: it waits for 22 s.
    let queued = line(0, &[1, 2], 0) + &line(10_000, &[1, 2], 1);
    assert_eq!(times(&queued, hardware(10, 0), SERVICE), [22 * second + 32_768 + second, 32 * second]);
    // Two workers: nothing is there yet when the second starts.
    let two = Service { workers: 2, ..SERVICE };
    assert_eq!(times(&queued, hardware(10, 0), two), [32 * second, 32 * second]);
}

/// A block that only Nvme has takes the device's time, and is counted as a hit of Nvme.
#[test]
fn a_hit_in_nvme_costs_the_device() {
    let pushed_out =
        line(0, &[1], 0) + &line(100_000, &[2], 1) + &line(200_000, &[3], 1) + &line(300_000, &[1], 2);
    let trace = trace_of(&pushed_out);
    let outcome = replay(&trace, hardware(2, 20), SERVICE, &ProgressBar::hidden());
    assert_eq!((outcome.block_hits.pinned, outcome.block_hits.nvme), (0, 1));
    // One frame at 100 kB/s, 250 us of latency, 16,384 bytes over the link, one token.
    assert_eq!(outcome.first_tokens[0], FRAME_BYTES * 10 + 250 + 16_384 + 1_000_000);
    assert_eq!(outcome.traffic.blocks_written, 3);
    assert_eq!(outcome.traffic.bytes_read, FRAME_BYTES);
    // Recomputing 16 tokens at 0.1 s each is quicker than such a slow device: the request does not wait longer.
    let quick = Service { profile: Profile { linear: 0.001, ..SERVICE.profile }, ..SERVICE };
    let outcome = replay(&trace, hardware(2, 20), quick, &ProgressBar::hidden());
    assert_eq!(outcome.block_hits.nvme, 0);
    assert_eq!(
        outcome.first_tokens[3], 32_000,
        "it gives up after the time that computing takes, and computes"
    );
}

/// A turn could start before the answer that it replies to.
#[test]
fn a_closed_loop_waits_for_the_answer() {
    let turns = line(0, &[1, 2], 0) + &line(1_000, &[1, 2, 3], 0);
    let closed = Service { closed_loop: true, ..SERVICE };
    let trace = trace_of(&turns);
    let outcome = replay(&trace, hardware(10, 0), closed, &ProgressBar::hidden());
    // 32 s of prefill and 2 s of decoding 20 tokens, then 32 ms of loading and 16 s of prefill.
    assert_eq!(outcome.simulated, 34_000_000 + 32_768 + 16_000_000);
    assert_eq!(outcome.first_tokens, [32_768 + 16_000_000, 32_000_000]);
}

/// Two runs could differ, a table could fall apart, or a request could be lost under load.
#[test]
fn a_busy_node_is_sound_and_repeatable() {
    let trace = trace_of(&conversations(4, 600));
    let service = Service {
        workers: 3,
        closed_loop: true,
        speed: 4.0,
        profile: Profile { linear: 0.02, ..SERVICE.profile },
        ..SERVICE
    };
    let hardware = || Hardware {
        device: DeviceModel { read_rate: 2e6, write_rate: 1e6, latency: 100 },
        ..hardware(40, 200)
    };
    let first = replay(&trace, hardware(), service, &ProgressBar::hidden());
    assert_eq!(first, replay(&trace, hardware(), service, &ProgressBar::hidden()));
    assert_eq!((first.requests, first.first_tokens.len()), (600, 600));
    assert!(first.block_hits.nvme > 0 && first.block_hits.pinned > 0, "{first:?}");
    assert!(first.evictions_pinned > 0 && first.evictions_nvme > 0, "{first:?}");
    assert_eq!(first.traffic.bytes_written, first.traffic.blocks_written * FRAME_BYTES);
}
