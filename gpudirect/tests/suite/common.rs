//! What the tests of devices share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, IoClass, MIB};
use terrace_gpudirect::{Chunk, Device, DeviceBytes, DeviceError, HostBytes, Lane, Mark, Piece, Span};

pub(crate) const CHUNK: ByteCount = ByteCount::new(4 * MIB);

pub(crate) fn host(bytes: u64) -> HostBytes {
    HostBytes::anonymous(ByteCount::new(bytes)).unwrap()
}

/// Bytes that name their place, and the seed.
pub(crate) fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at * 31 + seed * 7 + at / 4096) % 251).unwrap()).collect()
}

pub(crate) fn contents(host: &HostBytes) -> Vec<u8> {
    let mut bytes = vec![0; host.len()];
    host.copy_to(&mut bytes);
    bytes
}

pub(crate) fn on(chunk: &Arc<Chunk>, offset: u64, bytes: u64) -> Span {
    Span::Device(DeviceBytes::new(Arc::clone(chunk), offset, ByteCount::new(bytes)).unwrap())
}

/// Waits for a batch without an engine.
pub(crate) fn wait(mark: &mut Box<dyn Mark>) -> Result<(), DeviceError> {
    let began = Instant::now();
    while !mark.ended()? {
        assert!(began.elapsed() < Duration::from_secs(20), "a copy of some megabytes ends");
        std::thread::yield_now();
    }
    Ok(())
}

/// One copy, to its end.
pub(crate) fn copy(device: &dyn Device, source: Span, target: Span) -> Result<(), DeviceError> {
    let piece = Piece::new(source, target)?;
    let lane = Lane { direction: piece.direction(), class: IoClass::PrefillFetch };
    wait(&mut device.start(lane, Arc::from(vec![piece]))?)
}
