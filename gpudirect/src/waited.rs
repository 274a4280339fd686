//! Copies for a caller who has nothing else to do meanwhile: some bytes of a chunk
//! out to ordinary memory, or in from it. Slow against [`crate::Copies`], which is
//! for whoever moves many.

use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, IoClass};

use crate::device::{Device, Lane};
use crate::error::DeviceError;
use crate::host_bytes::HostBytes;
use crate::span::{DeviceBytes, Piece, Span};

/// How soon it is looked whether a copy has ended. Doubled each time, up to the second.
const LOOK_AFTER: [Duration; 2] = [Duration::from_micros(10), Duration::from_millis(1)];

/// Copies device memory to `target`, and waits.
///
/// # Errors
/// [`DeviceError::BadJob`] if the lengths differ; [`DeviceError::Late`]; what the device says. `target` is as before.
pub fn copy_out(
    device: &dyn Device,
    source: &DeviceBytes,
    target: &mut [u8],
    within: Duration,
) -> Result<(), DeviceError> {
    let host = staging(target.len(), source)?;
    run(device, Span::Device(source.clone()), Span::Host(host.clone()), within)?;
    host.copy_to(target);
    Ok(())
}

/// Copies `source` to device memory, and waits.
///
/// # Errors
/// As [`copy_out`]. Then the target may have any bytes.
pub fn copy_in(
    device: &dyn Device,
    source: &[u8],
    target: &DeviceBytes,
    within: Duration,
) -> Result<(), DeviceError> {
    let host = staging(source.len(), target)?;
    host.copy_from(source);
    run(device, Span::Host(host), Span::Device(target.clone()), within)
}

/// Memory that outlives a copy whose end nobody waits for.
fn staging(length: usize, other: &DeviceBytes) -> Result<HostBytes, DeviceError> {
    if length as u64 != other.bytes().get() {
        return Err(DeviceError::BadJob { detail: "source and target differ in length" });
    }
    HostBytes::anonymous(ByteCount::new(length as u64))
        .map_err(|error| DeviceError::Driver { call: "mmap", detail: error.to_string() })
}

fn run(device: &dyn Device, source: Span, target: Span, within: Duration) -> Result<(), DeviceError> {
    let piece = Piece::new(source, target)?;
    let direction = piece.direction();
    let lane = Lane { direction, class: IoClass::DecodeFetch };
    let mut mark = device.start(lane, Arc::new([piece]))?;
    let until = Instant::now() + within;
    let [mut pause, pause_max] = LOOK_AFTER;
    while !mark.ended()? {
        if Instant::now() > until {
            return Err(DeviceError::Late(within));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(pause_max);
    }
    Ok(())
}
