//! The same questions to every implementation of `DeviceMemory`: the stand-in
//! always, CUDA where there is a device.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

use terrace_core::ByteCount;
use terrace_gpudirect::{
    Buffer, Chunk, CudaMemory, DeviceError, DeviceMemory, HbmStatus, HostMemory, Transfer, probe,
};

const CHUNK: ByteCount = ByteCount::new(1 << 20);
const PIECE: ByteCount = ByteCount::new(64 << 10);

fn round_trip<D: DeviceMemory>(device: &D) {
    let mut chunk = device.allocate(CHUNK).unwrap();
    assert_eq!(chunk.length(), CHUNK);
    let mut buffer = device.buffer(PIECE).unwrap();
    for (index, byte) in buffer.bytes_mut().iter_mut().enumerate() {
        *byte = u8::try_from(index % 251).unwrap();
    }
    let last = ByteCount::new(CHUNK.get() - PIECE.get());
    let transfer = device.copy_in(buffer, &mut chunk, last).map_err(|returned| returned.error).unwrap();
    let mut buffer = transfer.wait().unwrap();
    buffer.bytes_mut().fill(0);
    let transfer = device.copy_out(&chunk, last, buffer).map_err(|returned| returned.error).unwrap();
    let buffer = transfer.wait().unwrap();
    let expected = (0..buffer.bytes().len()).map(|index| u8::try_from(index % 251).unwrap());
    assert!(buffer.bytes().iter().copied().eq(expected));
}

fn keeps_to_the_chunk<D: DeviceMemory>(device: &D) {
    let mut chunk = device.allocate(CHUNK).unwrap();
    let mut buffer = device.buffer(PIECE).unwrap();
    for offset in [CHUNK.get() - PIECE.get() + 1, CHUNK.get(), u64::MAX - 1, u64::MAX] {
        let offset = ByteCount::new(offset);
        let Err(refused) = device.copy_in(buffer, &mut chunk, offset) else { panic!("wrote at {offset:?}") };
        assert!(matches!(refused.error, DeviceError::OutOfBounds { .. }), "{}", refused.error);
        let Err(refused) = device.copy_out(&chunk, offset, refused.buffer) else { panic!("read {offset:?}") };
        assert!(matches!(refused.error, DeviceError::OutOfBounds { .. }), "{}", refused.error);
        buffer = refused.buffer;
    }
}

/// Bytes could land at the wrong offset or come back stale: write a pattern at the very end of a chunk, read it back.
#[test]
fn bytes_come_back() {
    round_trip(&HostMemory::new(ByteCount::new(4 << 20)));
}

/// A copy could leave its chunk by one byte or by overflow: try each, and expect the buffer back.
#[test]
fn a_copy_stays_in_its_chunk() {
    keeps_to_the_chunk(&HostMemory::new(ByteCount::new(4 << 20)));
}

/// A device could hand out more than it has, or forget to take it back: fill it, fail once, free, take again.
#[test]
fn a_full_device_says_so() {
    let device = HostMemory::new(CHUNK);
    let chunk = device.allocate(CHUNK).unwrap();
    let refused = device.allocate(ByteCount::new(1)).unwrap_err();
    assert_eq!(refused, DeviceError::NoMemory { bytes: 1 });
    assert_eq!(device.room().unwrap(), (ByteCount::new(0), CHUNK));
    drop(chunk);
    device.allocate(CHUNK).unwrap();
}

/// A missing driver library panics in the bindings: probing and opening must turn that into a plain answer.
/// With a device, the same questions go to it.
#[test]
fn no_driver_is_a_plain_fact() {
    match probe() {
        HbmStatus::Off { reason } => {
            eprintln!("skipped on the device: {reason}");
            assert!(reason.contains("Hbm tier off"), "{reason}");
            assert!(CudaMemory::open(0).is_err());
        }
        HbmStatus::Present { gpus } => {
            assert!(!gpus.is_empty());
            let device = CudaMemory::open(0).unwrap();
            round_trip(&device);
            keeps_to_the_chunk(&device);
            let (free, all) = device.room().unwrap();
            assert!(free <= all);
        }
    }
}
