//! The same questions to every implementation of `Device`: the stand-in always,
//! CUDA where there is a device.

use std::fs::File;
use std::sync::Arc;

use terrace_core::{ByteCount, MIB};
use terrace_gpudirect::{Device, DeviceBytes, DeviceError, Fault, HostOnly, Piece, Span};

use crate::common::{CHUNK, contents, copy, host, on, pattern};

fn stand_in() -> HostOnly {
    HostOnly::new(0, ByteCount::new(16 * MIB)).unwrap()
}

pub(crate) fn round_trip(device: &dyn Device) {
    let chunk = device.create(CHUNK).unwrap();
    assert_eq!(chunk.bytes(), CHUNK);
    let piece = 368_640;
    let bytes = pattern(piece, 1);
    let buffer = host(piece as u64);
    buffer.copy_from(&bytes);
    let last = CHUNK.get() - piece as u64;
    copy(device, Span::Host(buffer.clone()), on(&chunk, last, piece as u64)).unwrap();
    copy(device, on(&chunk, last, piece as u64), on(&chunk, 4096, piece as u64)).unwrap();
    buffer.copy_from(&vec![0; piece]);
    copy(device, on(&chunk, 4096, piece as u64), Span::Host(buffer.clone())).unwrap();
    assert_eq!(contents(&buffer), bytes);
}

pub(crate) fn fresh_chunks_are_zero(device: &dyn Device) {
    let chunk = device.create(CHUNK).unwrap();
    let buffer = host(CHUNK.get());
    buffer.copy_from(&vec![0xAA; buffer.len()]);
    copy(device, Span::Host(buffer.clone()), on(&chunk, 0, CHUNK.get())).unwrap();
    let other = device.import(chunk.export().unwrap(), chunk.bytes()).unwrap();
    let chunk = device.replace(chunk).unwrap();
    copy(device, on(&chunk, 0, CHUNK.get()), Span::Host(buffer.clone())).unwrap();
    assert!(contents(&buffer).iter().all(|byte| *byte == 0), "the next tenant finds bytes of the last");
    copy(device, on(&other, 0, CHUNK.get()), Span::Host(buffer.clone())).unwrap();
    assert!(contents(&buffer).iter().all(|byte| *byte == 0xAA), "whoever had the old memory keeps it");
}

/// Bytes could land at the wrong offset or come back stale: write at the very end of a chunk, move it, read it back.
#[test]
fn bytes_come_back() {
    round_trip(&stand_in());
}

/// A chunk that changes its tenant could show what the last one wrote, or be taken from whoever still maps it: fill it,
/// replace it, look from both sides.
#[test]
fn a_replaced_chunk_is_empty() {
    fresh_chunks_are_zero(&stand_in());
}

/// A range could leave its chunk by one byte or by overflow, or a copy have ends that do not fit.
#[test]
fn what_is_outside_is_refused() {
    let device = stand_in();
    let chunk = device.create(CHUNK).unwrap();
    for offset in [CHUNK.get() - 4095, CHUNK.get(), u64::MAX - 1, u64::MAX] {
        let refused = DeviceBytes::new(Arc::clone(&chunk), offset, ByteCount::new(4096)).unwrap_err();
        assert!(matches!(refused, DeviceError::OutOfBounds { .. }), "{refused}");
        let refused = host(CHUNK.get()).part(offset, ByteCount::new(4096)).unwrap_err();
        assert!(matches!(refused, DeviceError::OutOfBounds { .. }), "{refused}");
    }
    let unequal = Piece::new(Span::Host(host(4096)), on(&chunk, 0, 8192)).unwrap_err();
    let nothing = Piece::new(Span::Host(host(4096).part(0, ByteCount::new(0)).unwrap()), on(&chunk, 0, 0));
    let no_device = Piece::new(Span::Host(host(4096)), Span::Host(host(4096))).unwrap_err();
    for refused in [unequal, nothing.unwrap_err(), no_device] {
        assert!(matches!(refused, DeviceError::BadJob { .. }), "{refused}");
    }
}

/// A device could hand out more than it has, or forget to take it back: fill it, fail, free, take again; and fail
/// though there is room.
#[test]
fn a_full_device_says_so() {
    let device = HostOnly::new(0, CHUNK).unwrap();
    let chunk = device.create(ByteCount::new(CHUNK.get() - 1)).unwrap();
    let refused = device.create(ByteCount::new(1)).unwrap_err();
    assert_eq!(refused, DeviceError::NoMemory { bytes: 1 });
    assert_eq!(device.room().unwrap().free, ByteCount::new(0));
    drop(chunk);
    device.inject(Fault::NoMemory);
    assert!(matches!(device.create(CHUNK), Err(DeviceError::NoMemory { .. })));
    let room = device.room().unwrap();
    assert_eq!((room.free, room.chunks), (CHUNK, 0), "a refused chunk leaves nothing behind");
    device.create(CHUNK).unwrap();
}

/// A chunk could be replaced under a copy or a lease: keep a reference, and expect it back with the reason.
#[test]
fn a_chunk_in_use_is_not_replaced() {
    let device = stand_in();
    let chunk = device.create(CHUNK).unwrap();
    let lease = Arc::clone(&chunk);
    let kept = device.replace(chunk).unwrap_err();
    assert_eq!(kept.error, DeviceError::InUse { users: 1 });
    drop(lease);
    device.inject(Fault::NoMemory);
    let kept = device.replace(kept.chunk.unwrap()).unwrap_err();
    assert!(kept.chunk.is_none() && matches!(kept.error, DeviceError::NoMemory { .. }));
    assert_eq!(device.room().unwrap().chunks, 0);
}

/// Something that is no chunk, or shorter than it says, could be mapped and end the process at a touch.
#[test]
fn only_chunks_are_imported() {
    let device = stand_in();
    let chunk = device.create(CHUNK).unwrap();
    for (descriptor, bytes) in [
        (File::open("/dev/zero").unwrap().into(), CHUNK),
        (chunk.export().unwrap(), ByteCount::new(CHUNK.get() * 2)),
        (chunk.export().unwrap(), ByteCount::new(CHUNK.get() / 2)),
    ] {
        let refused = device.import(descriptor, bytes).unwrap_err();
        assert!(matches!(refused, DeviceError::BadDescriptor { .. }), "{refused}");
    }
    assert_eq!(device.room().unwrap().imports, 0);
}
