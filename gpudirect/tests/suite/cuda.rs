//! The CUDA device over a driver that is built for the test: what it calls, in
//! which order, and what it does when a call fails, hangs or is missing. On a
//! machine with a GPU the same questions go to the real driver too.

use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_core::ByteCount;
use terrace_gpudirect::{Cuda, Device, DeviceError, DeviceKind, HbmStatus, Span, probe};

use crate::common::{CHUNK, contents, copy, host, on, pattern};
use crate::copies::{BLOCK, SOON, bench_on, limits};
use crate::device::{fresh_chunks_are_zero, round_trip};
use crate::fake::{self, Driver, faults};

/// What the driver says is alive, streams and the context apart.
fn live() -> String {
    type Live = unsafe extern "C" fn(*mut u8, usize);
    let mut text = [0_u8; 256];
    // SAFETY: the stand-in is loaded by now, the function has this type, and writes at most so many bytes.
    unsafe {
        let live = cudarc::driver::sys::culib().get::<Live>(b"fake_live").unwrap();
        live(text.as_mut_ptr(), text.len());
    }
    let end = text.iter().position(|byte| *byte == 0).unwrap();
    String::from_utf8(text[..end].to_vec()).unwrap()
}

const NOTHING: &str = "contexts=0 streams=0 events=0 handles=0 ranges=0 maps=0 slices=0";

fn nothing_but_streams() -> bool {
    live().ends_with("events=0 handles=0 ranges=0 maps=0 slices=0")
}

fn works() {
    let device = Cuda::open(0).unwrap();
    let info = device.info().clone();
    assert_eq!((info.kind, info.driver_version, info.compute_capability), (DeviceKind::Cuda, 13_000, (9, 0)));
    assert_eq!((info.name.as_str(), info.uuid, info.rdma_capable), ("fake device", [0xF0; 16], true));
    assert!(matches!(Cuda::open(1), Err(DeviceError::NoDevice { ordinal: 1, count: 1 })));
    let HbmStatus::Present { gpus } = probe() else { panic!("{}", probe()) };
    assert_eq!((gpus.len(), gpus[0].bytes), (1, info.bytes));
    round_trip(&device);
    fresh_chunks_are_zero(&device);
    assert!(nothing_but_streams(), "{}", live());
    let full = device.create(ByteCount::new(info.bytes.get() + 1)).unwrap_err();
    assert!(matches!(full, DeviceError::NoMemory { bytes } if bytes > info.bytes.get()), "{full}");
    let device = engine_round_trip(device);
    drop(device);
    assert_eq!(live(), NOTHING);
}

/// Registered memory, three slices, there and back through the engine; answers the device when nobody else has it.
fn engine_round_trip(device: Cuda) -> Arc<Cuda> {
    let bench = bench_on(device, limits());
    assert_eq!(bench.pinned.add(&bench.memory).registered, CHUNK);
    let bytes = pattern(bench.memory.len(), 11);
    bench.memory.copy_from(&bytes);
    bench.promote(1, 1000, 3_000_000, SOON).unwrap();
    bench.log.answer(1).unwrap();
    let back = host(3_000_000);
    bench.demote(2, &back, 1000, SOON).unwrap();
    bench.log.answer(2).unwrap();
    assert!(contents(&back) == bytes[1000..3_001_000], "bytes over three slices");
    bench.log.release(2);
    bench.pinned.remove(&bench.memory);
    let device = Arc::clone(&bench.device);
    drop(bench);
    // The engine's threads let go of the device when they end.
    let began = Instant::now();
    while Arc::strong_count(&device) > 1 {
        assert!(began.elapsed() < SOON, "an engine without work ends");
        std::thread::yield_now();
    }
    device
}

/// Each call that may fail fails once; nothing of the attempt is left, and the next one works.
fn refusals() {
    let device = Cuda::open(0).unwrap();
    let chunk = device.create(CHUNK).unwrap();
    let memory = host(CHUNK.get());
    copy(&device, Span::Host(memory.clone()), on(&chunk, 0, CHUNK.get())).unwrap();
    let before = live();
    for word in ["no_memory", "no_range", "no_map"] {
        faults(word);
        device.create(CHUNK).unwrap_err();
        assert_eq!(live(), before, "after {word}");
        faults("");
        device.create(CHUNK).unwrap();
    }
    faults("no_map");
    let refused = device.import(chunk.export().unwrap(), CHUNK).unwrap_err();
    assert!(matches!(refused, DeviceError::BadDescriptor { .. }), "{refused}");
    faults("no_register");
    let refused = device.register(memory.clone()).unwrap_err();
    assert!(matches!(refused, DeviceError::Driver { call: "cuMemHostRegister", .. }), "{refused}");
    for word in ["no_copy", "no_event"] {
        faults(word);
        copy(&device, Span::Host(memory.clone()), on(&chunk, 0, CHUNK.get())).unwrap_err();
    }
    faults("");
    assert_eq!(live(), before);
    for (descriptor, bytes) in [
        (std::fs::File::open("/dev/null").unwrap().into(), CHUNK),
        (chunk.export().unwrap(), ByteCount::new(CHUNK.get() * 2)),
    ] {
        let refused = device.import(descriptor, bytes).unwrap_err();
        assert!(matches!(refused, DeviceError::BadDescriptor { .. }), "{refused}");
    }
    assert_eq!(live(), before);
    let room = device.room().unwrap();
    assert_eq!((room.chunks, room.imports, room.registrations, room.flights), (1, 0, 0, 0));
}

/// Past its deadline a copy is answered, and its memory is kept until the event is there.
fn late() {
    let bench = bench_on(Cuda::open(0).unwrap(), limits());
    bench.pinned.add(&bench.memory);
    faults("hold");
    bench.promote(1, 0, BLOCK, Duration::from_millis(30)).unwrap();
    assert!(matches!(bench.log.answer(1), Err(DeviceError::Late(_))));
    assert!(!bench.log.is_released(1));
    assert_eq!(bench.device.room().unwrap().flights, 1);
    faults("");
    bench.log.release(1);
    assert_eq!(bench.device.room().unwrap().flights, 0);
    bench.promote(2, 0, BLOCK, SOON).unwrap();
    bench.log.answer(2).unwrap();
}

/// The device is lost under a copy, and its reset hangs at first.
fn lost() {
    let bench = bench_on(Cuda::open(0).unwrap(), limits());
    bench.pinned.add(&bench.memory);
    faults("hold");
    bench.promote(1, 0, BLOCK, SOON).unwrap();
    bench.log.wait(|_| bench.device.room().is_ok_and(|room| room.flights == 1));
    faults("hold lost hang_reset");
    assert!(bench.log.answer(1).unwrap_err().is_lost());
    assert!(bench.promote(2, 0, BLOCK, SOON).unwrap_err().is_lost());
    assert!(bench.device.create(CHUNK).unwrap_err().is_lost());
    assert!(!bench.log.is_released(1), "nobody has said that the device is done");
    faults("hold lost");
    bench.log.release(1);
    assert!(bench.copies.lost().is_some());
    assert_eq!(bench.copies.counts().bytes, ByteCount::new(0));
}

fn opening_fails(word: &str, expected: fn(&DeviceError) -> bool) {
    faults(word);
    let began = Instant::now();
    let refused = Cuda::open_within(0, Duration::from_millis(500)).unwrap_err();
    assert!(expected(&refused), "{word}: {refused}");
    assert!(began.elapsed() < Duration::from_secs(5), "{word}");
}

/// Runs in a process of its own, under the tests below.
#[test]
fn in_child() {
    let Some(part) = fake::part() else { return };
    match part.as_str() {
        "works" => works(),
        "refusals" => refusals(),
        "late" => late(),
        "lost" => lost(),
        "hang" => {
            opening_fails("hang", |error| matches!(error, DeviceError::Hung { .. }));
            faults("");
        }
        "mismatch" => opening_fails("mismatch", |error| matches!(error, DeviceError::NoDriver { .. })),
        "no_device" => {
            opening_fails("no_device", |error| matches!(error, DeviceError::NoDevice { count: 0, .. }))
        }
        "no_vmm" => opening_fails("no_vmm", |error| matches!(error, DeviceError::Unsupported { .. })),
        "old" | "missing" => {
            opening_fails(&part, |error| matches!(error, DeviceError::DriverTooOld { .. }));
            assert!(matches!(probe(), HbmStatus::Off { .. }));
        }
        _ => return,
    }
    fake::ran(&part);
}

/// The calls could be in the wrong order, over the wrong range, or leave handles behind: a driver that checks and counts.
#[test]
fn a_driver_finds_nothing_to_object_to() {
    fake::run("cuda::in_child", "works", Driver::Fake);
}

/// Each failed call could leave memory, ranges, events or registrations behind: fail each, count.
#[test]
fn failed_calls_leave_nothing() {
    fake::run("cuda::in_child", "refusals", Driver::Fake);
}

/// As for the stand-in, over driver events.
#[test]
fn late_copies_keep_their_memory() {
    fake::run("cuda::in_child", "late", Driver::Fake);
}

/// As for the stand-in, over a context that breaks.
#[test]
fn a_lost_device_is_shut_before_memory_is_free() {
    fake::run("cuda::in_child", "lost", Driver::Fake);
}

/// A driver that is old, incomplete, broken, without a device or hanging must be an error value: each kind once.
#[test]
fn a_wrong_driver_is_an_answer() {
    for part in ["old", "mismatch", "no_device", "no_vmm", "hang"] {
        fake::run("cuda::in_child", part, Driver::Fake);
    }
    fake::run("cuda::in_child", "missing", Driver::WithoutMemCreate);
}

/// A missing library panics in the bindings: probing and opening must turn that into a plain answer. With a device,
/// the questions to the stand-in go to it.
#[test]
fn no_driver_is_a_plain_fact() {
    match probe() {
        HbmStatus::Off { reason } => {
            eprintln!("skipped on a device: {reason}");
            assert!(reason.contains("Hbm tier off"), "{reason}");
            Cuda::open(0).unwrap_err();
        }
        HbmStatus::Present { gpus } => {
            assert!(!gpus.is_empty());
            let device = Cuda::open(0).unwrap();
            round_trip(&device);
            fresh_chunks_are_zero(&device);
            engine_round_trip(Cuda::open(0).unwrap());
            let room = device.room().unwrap();
            assert!(room.free <= room.total);
            assert_eq!((room.chunks, room.imports, room.flights), (0, 0, 0));
        }
    }
}
