//! How long slow effects take: histograms for `/metrics`, and the read rate that
//! estimates of fetch times come from.

use std::sync::Mutex;
use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts};
use terrace_core::{ByteCount, Fault, Micros};

/// A slow effect, for labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpKind {
    /// Memory for a chunk.
    CreateChunk,
    /// A window that was handed back.
    CloseWindow,
    /// Memory given back.
    DropChunk,
    /// Device to frame.
    Read,
    /// Frame to device.
    Write,
    /// A slot's header.
    CarveSlot,
    /// Sync and catalog batch.
    Commit,
    /// A space cleared.
    ClearSpace,
    /// A payload's checksum.
    Verify,
    /// Frame to frame.
    Copy,
    /// A copy on a device read again.
    Scrub,
}

impl OpKind {
    const fn label(self) -> &'static str {
        match self {
            Self::CreateChunk => "create_chunk",
            Self::CloseWindow => "close_window",
            Self::DropChunk => "drop_chunk",
            Self::Read => "read",
            Self::Write => "write",
            Self::CarveSlot => "carve_slot",
            Self::Commit => "commit",
            Self::ClearSpace => "clear_space",
            Self::Verify => "verify",
            Self::Copy => "copy",
            Self::Scrub => "scrub",
        }
    }
}

/// Durations, faults and the read rate.
pub struct Rates {
    /// Durations by operation.
    pub(crate) seconds: HistogramVec,
    /// Faults by operation and kind.
    pub(crate) faults: IntCounterVec,
    read: Mutex<ReadRate>,
}

/// Smoothed over about sixteen reads. Starts from a modest SSD.
struct ReadRate {
    latency_us: f64,
    bytes_per_us: f64,
}

impl Default for Rates {
    fn default() -> Self {
        let buckets = vec![0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];
        let options = HistogramOpts::new(
            "terrace_operation_seconds",
            "Time that slow operations of the daemon took, queues included.",
        );
        let faults = Opts::new("terrace_operation_faults_total", "Slow operations that failed.");
        Self {
            seconds: HistogramVec::new(options.buckets(buckets), &["operation"])
                .expect("name and label are valid"),
            faults: IntCounterVec::new(faults, &["operation", "fault"]).expect("name and labels are valid"),
            read: Mutex::new(ReadRate { latency_us: 200.0, bytes_per_us: 500.0 }),
        }
    }
}

impl Rates {
    pub(crate) fn observe(&self, kind: OpKind, took: Duration, bytes: u64, fault: Option<Fault>) {
        self.seconds.with_label_values(&[kind.label()]).observe(took.as_secs_f64());
        if let Some(fault) = fault {
            let label = match fault {
                Fault::Device => "device",
                Fault::NotStarted => "not_started",
                Fault::NoSpace => "no_space",
                Fault::Checksum => "checksum",
                Fault::NoMemory => "no_memory",
                Fault::StillMapped => "still_mapped",
                Fault::Catalog => "catalog",
            };
            self.faults.with_label_values(&[kind.label(), label]).inc();
        } else if kind == OpKind::Read && bytes > 0 {
            let mut rate = self.read.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let took = took.as_secs_f64() * 1e6;
            let bytes = ByteCount::new(bytes);
            rate.latency_us += (took - rate.latency_us) / 16.0;
            rate.bytes_per_us += (float(bytes) / took.max(1.0) - rate.bytes_per_us) / 16.0;
        }
    }

    /// Estimated time of reading this many bytes from Nvme now.
    pub fn read_estimate(&self, bytes: ByteCount) -> Micros {
        let rate = self.read.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let stream = float(bytes) / rate.bytes_per_us.max(1.0);
        let estimate = Duration::from_secs_f64(stream.max(rate.latency_us / 4.0).clamp(1.0, 1e12) / 1e6);
        Micros::new(u64::try_from(estimate.as_micros()).unwrap_or(u64::MAX))
    }
}

/// Exact below 2^53 bytes, and only an estimate is made of it.
#[allow(clippy::cast_precision_loss, reason = "estimates need no more than 53 bits")]
fn float(bytes: ByteCount) -> f64 {
    bytes.get() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Estimates could run away or stay at their start: after many slow reads they must follow the disk.
    #[test]
    fn estimates_follow_the_disk() {
        let rates = Rates::default();
        let block = ByteCount::new(1 << 20);
        let before = rates.read_estimate(block);
        for _ in 0..200 {
            rates.observe(OpKind::Read, Duration::from_millis(20), block.get(), None);
        }
        let after = rates.read_estimate(block);
        assert!(after > before, "{after:?}");
        assert!((15_000..25_000).contains(&after.get()), "{after:?}");
        rates.observe(OpKind::Read, Duration::ZERO, u64::MAX, None);
        assert!(rates.read_estimate(ByteCount::new(u64::MAX)).get() > 0);
    }
}
