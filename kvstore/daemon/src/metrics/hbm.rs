//! Devices of the Hbm tier, by the name that the configuration gives them.

use prometheus::{GaugeVec, IntCounterVec, Opts, Registry};

use terrace_core::GpuView;

use super::float;
use crate::engine::Engine;
use crate::hbm::Activity;

type Level = (&'static str, &'static str, fn(&GpuView, &Activity) -> u64);

const LEVELS: [Level; 9] = [
    ("terrace_hbm_usable", "1 while a device is there and not lost.", |view, _| view.usable.into()),
    ("terrace_hbm_bytes", "Bytes of chunks of a device.", |view, _| view.memory.bytes.get()),
    ("terrace_hbm_limit_bytes", "Bytes that chunks of a device may take.", |view, _| {
        view.memory.bytes_max.get()
    }),
    ("terrace_hbm_sealed_bytes", "Payload bytes of sealed blocks.", |view, _| view.memory.sealed_bytes.get()),
    ("terrace_hbm_given_back_bytes", "Bytes that engines asked for and have.", |view, _| view.free.get()),
    ("terrace_hbm_registered_bytes", "Host memory that a device reaches at full speed.", |_, now| {
        now.registered.get()
    }),
    ("terrace_hbm_chunks_alive", "Chunks that live on a device.", |_, now| now.chunks),
    ("terrace_hbm_copies_flying", "Copies that a device has.", |_, now| now.copies.flying),
    ("terrace_hbm_copies_held", "Copies that a device has and nobody waits for.", |_, now| now.copies.held),
];

const COUNTS: [Level; 6] = [
    ("terrace_hbm_copied_bytes_total", "Bytes that copies moved.", |_, now| {
        now.copies.done_bytes_total.get()
    }),
    ("terrace_hbm_copies_failed_total", "Copies that failed.", |_, now| now.copies.failed_total),
    ("terrace_hbm_copies_late_total", "Copies that came too late.", |_, now| now.copies.late_total),
    ("terrace_hbm_copies_bounced_total", "Copies over memory that is not registered.", |_, now| {
        now.copies.bounced_total
    }),
    ("terrace_hbm_direct_reads_total", "Reads by cuFile.", |_, now| now.direct_reads),
    ("terrace_hbm_direct_reads_fallen_back_total", "Of these, repeated through host memory.", |_, now| {
        now.fallen_back
    }),
];

/// Adds what the devices are and do; nothing where none is configured.
pub(super) fn devices(
    registry: &Registry,
    engine: &Engine,
    views: &[GpuView],
) -> Result<(), prometheus::Error> {
    if views.is_empty() {
        return Ok(());
    }
    let seen: Vec<(String, &GpuView, Activity)> = views
        .iter()
        .map(|view| (engine.hbm().name(view.gpu), view, engine.hbm().activity(view.gpu).unwrap_or_default()))
        .collect();
    for (name, help, value) in LEVELS {
        let gauge = GaugeVec::new(Opts::new(name, help), &["device"])?;
        for (device, view, now) in &seen {
            gauge.with_label_values(&[device]).set(float(value(view, now)));
        }
        registry.register(Box::new(gauge))?;
    }
    for (name, help, value) in COUNTS {
        let counter = IntCounterVec::new(Opts::new(name, help), &["device"])?;
        for (device, view, now) in &seen {
            counter.with_label_values(&[device]).inc_by(value(view, now));
        }
        registry.register(Box::new(counter))?;
    }
    Ok(())
}
