//! What a device can do, measured at start beside the traffic: rate and latency
//! of reads and writes by block size and depth, and how many bytes it needs at
//! once to be busy.
//!
//! It works behind the end of the blocks, in the idle class, and writes back what
//! it read there, so that it cannot destroy anything. It is bounded in time and
//! bytes, and gives up when an I/O fails. Figures are as quick as the device can
//! be: the scratch area is small enough for its cache.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use terrace_core::{Fault, IoClass, KIB, MIB};

use super::{AlignedPages, BlockIo, IoBuffer, IoOp, IoRequest, Scheduler};

/// Room behind the blocks.
pub(crate) const SCRATCH_BYTES: u64 = 8 * MIB;
/// Large blocks have fewer places than small ones.
const LARGE_BYTES: u64 = 2 * MIB;
const SMALL_ROOM: u64 = 512 * KIB;
/// Sizes that are measured: a page, a small block, the block of a small model, the block of a large one.
const SIZES: [u64; 4] = [4 * KIB, 64 * KIB, 368_640, LARGE_BYTES];
const DEPTHS: [u32; 3] = [1, 4, 16];
/// One figure takes at most this, but for its last I/Os.
const CELL_TIME: Duration = Duration::from_millis(25);
const CELL_BYTES: u64 = 16 * MIB;
const CELL_OPS_MIN: u32 = 4;
/// The whole test of one device.
const TEST_TIME: Duration = Duration::from_secs(2);
/// Longest wait for one I/O.
const IO_TIME: Duration = Duration::from_secs(1);
/// A depth that reaches this part of the best rate is deep enough.
const ENOUGH: f64 = 0.95;
/// Bytes in flight are never capped lower.
const IN_FLIGHT_MIN: u64 = 4 * MIB;

/// One figure of the self-test.
#[derive(Clone, Debug, PartialEq)]
pub struct SelfTestLine {
    /// `read` or `write`.
    pub operation: &'static str,
    /// Bytes of one I/O.
    pub bytes: u64,
    /// I/Os at once.
    pub depth: u32,
    /// Rate in bytes per second.
    pub bytes_per_second: f64,
    /// Median time of one I/O in microseconds.
    pub latency_us: f64,
}

/// A device under test.
pub(crate) struct Rig<'a> {
    pub(crate) scheduler: &'a Scheduler,
    /// First byte of the scratch area.
    pub(crate) scratch: u64,
    pub(crate) stop: &'a AtomicBool,
}

/// What became of the test of one device.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    pub(crate) lines: Vec<SelfTestLine>,
    /// Bytes that it needs at once.
    pub(crate) in_flight: Option<u64>,
    /// Why there is not more.
    pub(crate) note: Option<String>,
}

type Answer = (usize, IoBuffer, Result<(), Fault>);

impl Rig<'_> {
    /// Measures. Takes up to two seconds.
    pub(crate) fn run(&self) -> Measured {
        let ends = Instant::now() + TEST_TIME;
        let mut measured = Measured::default();
        match self.everything(ends, &mut measured.lines) {
            Ok(()) => {}
            Err(why) => measured.note = Some(format!("self-test: {why}")),
        }
        measured.in_flight = in_flight(&measured.lines);
        measured
    }

    fn everything(&self, ends: Instant, lines: &mut Vec<SelfTestLine>) -> Result<(), &'static str> {
        for room in [SMALL_ROOM, LARGE_BYTES] {
            let places = SCRATCH_BYTES / room;
            let mut buffers: Vec<Option<AlignedPages>> =
                (0..places).map(|_| Some(AlignedPages::new(room))).collect();
            // What is there, and then there as written: a first write to a file costs more than those after it.
            for op in [IoOp::Read, IoOp::Write] {
                self.cell(op, room, 1, room, &mut buffers, u32::try_from(places).unwrap_or(u32::MAX))?;
            }
            for bytes in SIZES.into_iter().filter(|bytes| (*bytes == LARGE_BYTES) == (room == LARGE_BYTES)) {
                for depth in DEPTHS.into_iter().filter(|depth| u64::from(*depth) <= places) {
                    for op in [IoOp::Read, IoOp::Write] {
                        if Instant::now() >= ends {
                            return Err("time ran out; the device or the machine is busy");
                        }
                        lines.push(self.cell(op, bytes, depth, room, &mut buffers, 0)?);
                    }
                }
            }
        }
        Ok(())
    }

    /// Keeps `depth` I/Os going until there were enough of them, exactly `count` if it is not zero.
    fn cell(
        &self,
        op: IoOp,
        bytes: u64,
        depth: u32,
        room: u64,
        buffers: &mut [Option<AlignedPages>],
        count: u32,
    ) -> Result<SelfTestLine, &'static str> {
        let (sender, answers) = channel();
        let began = Instant::now();
        let (mut started, mut ended) = (0u32, 0u32);
        let mut begun = vec![began; buffers.len()];
        // In turn, so that each place has its turn.
        let mut free: VecDeque<usize> = (0..buffers.len()).collect();
        let mut latencies = Vec::new();
        loop {
            let enough = u64::from(started) * bytes >= CELL_BYTES || began.elapsed() >= CELL_TIME;
            let more = if count > 0 { started < count } else { started < CELL_OPS_MIN.max(depth) || !enough };
            let next = if more && started - ended < depth { free.pop_front() } else { None };
            if let Some(place) = next {
                let Some(pages) = buffers[place].take() else { return Err("a place is in use twice") };
                begun[place] = Instant::now();
                self.start(op, bytes, place, room, pages, &sender);
                started += 1;
                continue;
            }
            if started == ended {
                break;
            }
            let (place, pages) = self.answer(&answers)?;
            buffers[place] = Some(pages);
            free.push_back(place);
            latencies.push(begun[place].elapsed().as_secs_f64() * 1e6);
            ended += 1;
        }
        let seconds = began.elapsed().as_secs_f64().max(1e-9);
        latencies.sort_by(f64::total_cmp);
        let operation = if op == IoOp::Read { "read" } else { "write" };
        let bytes_per_second = float(u64::from(ended) * bytes) / seconds;
        let latency_us = latencies.get(latencies.len() / 2).copied().unwrap_or(0.0);
        Ok(SelfTestLine { operation, bytes, depth, bytes_per_second, latency_us })
    }

    fn start(
        &self,
        op: IoOp,
        bytes: u64,
        place: usize,
        room: u64,
        pages: AlignedPages,
        sender: &Sender<Answer>,
    ) {
        let sender = sender.clone();
        self.scheduler.submit(IoRequest {
            op,
            offset: self.scratch + place as u64 * room,
            bytes,
            buffer: IoBuffer::Pages(pages),
            class: IoClass::Scrub,
            done: Box::new(move |buffer, outcome| {
                // The test may have given up.
                let _ = sender.send((place, buffer, outcome));
            }),
        });
    }

    fn answer(&self, answers: &Receiver<Answer>) -> Result<(usize, AlignedPages), &'static str> {
        if self.stop.load(Ordering::Acquire) {
            return Err("the daemon stops");
        }
        let answer = answers.recv_timeout(IO_TIME).map_err(|_| "no answer within a second")?;
        match answer {
            (place, IoBuffer::Pages(pages), Ok(())) => Ok((place, pages)),
            (_, _, Err(_)) => Err("an I/O failed"),
            (_, IoBuffer::Nothing | IoBuffer::Frame(..) | IoBuffer::Frames(..), Ok(())) => {
                Err("a buffer is lost")
            }
        }
    }
}

/// Bytes that keep the device busy with reads of any size, twice: one half waits in the device
/// while the other moves.
fn in_flight(lines: &[SelfTestLine]) -> Option<u64> {
    let mut needed: Option<u64> = None;
    for size in SIZES {
        let reads: Vec<_> =
            lines.iter().filter(|line| line.operation == "read" && line.bytes == size).collect();
        let best = reads.iter().map(|line| line.bytes_per_second).fold(0.0, f64::max);
        let enough = reads.iter().find(|line| line.bytes_per_second >= best * ENOUGH);
        needed = needed.max(enough.map(|line| u64::from(line.depth) * size * 2));
    }
    needed.map(|needed| needed.max(IN_FLIGHT_MIN))
}

/// Exact below 2^53.
#[allow(clippy::cast_precision_loss, reason = "rates need no more than 53 bits")]
fn float(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(bytes: u64, depth: u32, bytes_per_second: f64) -> SelfTestLine {
        SelfTestLine { operation: "read", bytes, depth, bytes_per_second, latency_us: 1.0 }
    }

    /// A cap below what keeps the device busy halves its speed; one far above makes a decode wait.
    #[test]
    fn bytes_in_flight_follow_the_figures() {
        assert_eq!(in_flight(&[]), None);
        let busy_at_once = [line(LARGE_BYTES, 1, 2e9), line(LARGE_BYTES, 4, 2.05e9)];
        assert_eq!(in_flight(&busy_at_once), Some(IN_FLIGHT_MIN));
        let needs_depth = [line(LARGE_BYTES, 1, 1e9), line(LARGE_BYTES, 4, 3e9)];
        assert_eq!(in_flight(&needs_depth), Some(16 * MIB));
        let small_blocks = [line(368_640, 1, 1e9), line(368_640, 4, 2e9), line(368_640, 16, 6e9)];
        assert_eq!(in_flight(&small_blocks), Some(368_640 * 32));
    }
}
