//! The copy engine over the stand-in: what goes wrong on a device, one at a time
//! and in storms, and what is left afterwards.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, IoClass, MIB};
use terrace_gpudirect::{
    Chunk, Copies, CopyLimits, Device, DeviceError, Ends, Fault, HostBytes, HostOnly, Job, JobId, Piece,
    Pinned, Span,
};

use crate::common::{CHUNK, contents, host, on, pattern};

pub(crate) const SOON: Duration = Duration::from_secs(20);
pub(crate) const BLOCK: u64 = 368_640;

/// Answers of a job, and how often it was released.
pub(crate) type Told = BTreeMap<JobId, (Vec<Result<(), DeviceError>>, u32)>;

#[derive(Default)]
pub(crate) struct Log {
    ends: Mutex<Told>,
    order: Mutex<Vec<JobId>>,
    changed: Condvar,
}

impl Ends for Log {
    fn answered(&self, id: JobId, result: Result<(), DeviceError>) {
        let mut ends = self.ends.lock().unwrap();
        let end = ends.entry(id).or_default();
        assert_eq!(end.1, 0, "an answer comes before the release");
        end.0.push(result);
        self.changed.notify_all();
    }

    fn released(&self, id: JobId) {
        let mut ends = self.ends.lock().unwrap();
        let end = ends.entry(id).or_default();
        assert_eq!(end.0.len(), 1, "a release comes after the answer");
        end.1 += 1;
        self.order.lock().unwrap().push(id);
        self.changed.notify_all();
    }
}

impl Log {
    pub(crate) fn wait(&self, mut there: impl FnMut(&Told) -> bool) {
        let began = Instant::now();
        let mut ends = self.ends.lock().unwrap();
        while !there(&ends) {
            assert!(began.elapsed() < SOON, "{:?}", *ends);
            ends = self.changed.wait_timeout(ends, Duration::from_millis(100)).unwrap().0;
        }
    }

    pub(crate) fn answer(&self, id: u64) -> Result<(), DeviceError> {
        self.wait(|ends| ends.get(&JobId(id)).is_some_and(|end| !end.0.is_empty()));
        self.ends.lock().unwrap()[&JobId(id)].0[0].clone()
    }

    pub(crate) fn release(&self, id: u64) {
        self.wait(|ends| ends.get(&JobId(id)).is_some_and(|end| end.1 == 1));
    }

    pub(crate) fn is_released(&self, id: u64) -> bool {
        self.ends.lock().unwrap().get(&JobId(id)).is_some_and(|end| end.1 > 0)
    }
}

/// A device with an engine, a chunk, and host memory of the chunk's length.
pub(crate) struct Bench<D> {
    pub(crate) device: Arc<D>,
    pub(crate) pinned: Arc<Pinned>,
    pub(crate) copies: Copies,
    pub(crate) log: Arc<Log>,
    pub(crate) chunk: Arc<Chunk>,
    pub(crate) memory: HostBytes,
}

pub(crate) fn limits() -> CopyLimits {
    CopyLimits { jobs_max: 64, bytes_max: ByteCount::new(64 * MIB), flights_max: 2, ..CopyLimits::ONE_LINK }
}

fn bench(limits: CopyLimits) -> Bench<HostOnly> {
    bench_on(HostOnly::new(0, ByteCount::new(64 * MIB)).unwrap(), limits)
}

pub(crate) fn bench_on<D: Device + 'static>(device: D, limits: CopyLimits) -> Bench<D> {
    let device = Arc::new(device);
    let pinned = Arc::new(Pinned::new(Arc::clone(&device) as Arc<dyn Device>, ByteCount::new(MIB)));
    let log = Arc::new(Log::default());
    let copies = Copies::start(
        Arc::clone(&device) as Arc<dyn Device>,
        Arc::clone(&pinned),
        limits,
        Arc::clone(&log) as Arc<dyn Ends>,
    )
    .unwrap();
    let chunk = device.create(CHUNK).unwrap();
    let memory = host(CHUNK.get());
    Bench { device, pinned, copies, log, chunk, memory }
}

impl<D> Bench<D> {
    pub(crate) fn promote(
        &self,
        id: u64,
        offset: u64,
        bytes: u64,
        within: Duration,
    ) -> Result<(), DeviceError> {
        let source = Span::Host(self.memory.part(offset, ByteCount::new(bytes)).unwrap());
        let piece = Piece::new(source, on(&self.chunk, offset, bytes)).unwrap();
        self.submit(id, vec![piece], within)
    }

    pub(crate) fn demote(
        &self,
        id: u64,
        target: &HostBytes,
        offset: u64,
        within: Duration,
    ) -> Result<(), DeviceError> {
        let source = on(&self.chunk, offset, target.len() as u64);
        self.submit(id, vec![Piece::new(source, Span::Host(target.clone())).unwrap()], within)
    }

    fn submit(&self, id: u64, pieces: Vec<Piece>, within: Duration) -> Result<(), DeviceError> {
        let job = Job { id: JobId(id), class: IoClass::DecodeFetch, pieces, within };
        self.copies.submit(job).map_err(|refused| {
            assert!(refused.job.id == JobId(id), "a refused job comes back");
            refused.error
        })
    }
}

/// Copies over slices, over memory that is not registered and over both could tear at the seams: send each there and
/// back and compare.
#[test]
fn bytes_arrive_whether_registered_or_not() {
    let bench = bench(limits());
    bench.device.inject(Fault::NoRegistration);
    let added = bench.pinned.add(&bench.memory);
    assert_eq!((added.registered.get(), added.bounced.get()), (3 * MIB, MIB));
    assert!(added.why.is_some());
    let bytes = pattern(bench.memory.len(), 3);
    bench.memory.copy_from(&bytes);
    // In the slice that failed, over the seam, and far from it.
    for (id, offset) in [(1, 0), (2, MIB - BLOCK / 2), (3, 2 * MIB - BLOCK / 2)] {
        bench.promote(id, offset, BLOCK, SOON).unwrap();
        bench.log.answer(id).unwrap();
        let back = host(BLOCK);
        bench.demote(id + 10, &back, offset, SOON).unwrap();
        bench.log.answer(id + 10).unwrap();
        let from = usize::try_from(offset).unwrap();
        assert_eq!(contents(&back), bytes[from..from + back.len()], "block at {offset}");
    }
    bench.log.wait(|ends| ends.values().all(|end| end.1 == 1));
    let counts = bench.copies.counts();
    assert_eq!((counts.done_total, counts.bounced_total, counts.bytes.get()), (6, 5, 0));
    bench.pinned.remove(&bench.memory);
    let room = bench.device.room().unwrap();
    assert_eq!((room.registrations, room.flights), (0, 0));
}

/// A deadline could free memory under a copy that still runs: hold the device, see the answer, and see that the memory
/// is written later and released only then.
#[test]
fn a_late_copy_keeps_its_memory() {
    let bench = bench(limits());
    bench.memory.copy_from(&pattern(bench.memory.len(), 5));
    bench.device.inject(Fault::Hold);
    bench.promote(1, 0, BLOCK, Duration::from_millis(20)).unwrap();
    let late = bench.log.answer(1).unwrap_err();
    assert!(matches!(late, DeviceError::Late(_)), "{late}");
    assert!(!bench.log.is_released(1));
    let counts = bench.copies.counts();
    assert_eq!((counts.held, counts.late_total, counts.bytes.get()), (1, 1, BLOCK));
    let kept = bench.device.replace(Arc::clone(&bench.chunk)).unwrap_err();
    assert!(matches!(kept.error, DeviceError::InUse { .. }));
    bench.device.inject(Fault::LetGo);
    bench.log.release(1);
    assert_eq!(bench.copies.counts().held, 0);
}

/// A job that waits its whole time behind a device that hangs never touched anything: it is answered and released at once.
#[test]
fn what_never_started_is_free_at_once() {
    let bench = bench(CopyLimits { flights_max: 1, ..limits() });
    bench.device.inject(Fault::Hold);
    bench.promote(1, 0, BLOCK, SOON).unwrap();
    bench.promote(2, BLOCK, BLOCK, Duration::from_millis(20)).unwrap();
    assert!(matches!(bench.log.answer(2), Err(DeviceError::Late(_))));
    bench.log.release(2);
    assert!(!bench.log.is_released(1));
    bench.device.inject(Fault::LetGo);
    bench.log.answer(1).unwrap();
    assert_eq!(bench.copies.counts().done_total, 1);
}

/// Queues without a limit would grow behind a device that hangs: fill each limit and expect its name.
#[test]
fn full_queues_say_so() {
    let bench = bench(CopyLimits { jobs_max: 3, bytes_max: ByteCount::new(4 * MIB), ..limits() });
    bench.device.inject(Fault::Hold);
    let too_large = bench.promote(1, 0, CHUNK.get(), SOON).and_then(|()| bench.promote(2, 0, BLOCK, SOON));
    assert_eq!(too_large, Err(DeviceError::Throttled { limit: "copy_bytes_max" }));
    bench.device.inject(Fault::LetGo);
    bench.log.release(1);
    bench.device.inject(Fault::Hold);
    for id in 3..6 {
        bench.promote(id, 0, 4096, SOON).unwrap();
    }
    assert_eq!(bench.promote(6, 0, 4096, SOON), Err(DeviceError::Throttled { limit: "copy_jobs_max" }));
    bench.device.inject(Fault::LetGo);
    for id in 3..6 {
        bench.log.answer(id).unwrap();
    }
}

/// One failure must cost one job: refuse a start, fail a copy, and go on.
#[test]
fn a_failed_batch_harms_no_other() {
    let bench = bench(limits());
    for (id, fault) in [(1, Fault::RefusedStart), (2, Fault::FailedCopy)] {
        bench.device.inject(fault);
        bench.promote(id, 0, BLOCK, SOON).unwrap();
        assert!(matches!(bench.log.answer(id), Err(DeviceError::Driver { .. })));
        bench.log.release(id);
    }
    bench.promote(3, 0, BLOCK, SOON).unwrap();
    bench.log.answer(3).unwrap();
    assert!(bench.copies.lost().is_none());
}

/// A lost device must answer everybody, and give memory back only after it was shut: lose it with jobs under way and
/// waiting, while the driver hangs.
#[test]
fn a_lost_device_answers_everybody() {
    let bench = bench(CopyLimits { flights_max: 1, ..limits() });
    bench.device.inject(Fault::Hold);
    for id in 1..5 {
        bench.promote(id, 0, BLOCK, SOON).unwrap();
    }
    bench.log.wait(|_| bench.copies.counts().flying == 1);
    bench.device.inject(Fault::LoseAndHang);
    for id in 1..5 {
        assert!(bench.log.answer(id).unwrap_err().is_lost());
    }
    for id in 2..5 {
        bench.log.release(id);
    }
    assert!(!bench.log.is_released(1), "the driver has not said that the copy is over");
    assert!(bench.promote(9, 0, BLOCK, SOON).unwrap_err().is_lost());
    bench.device.inject(Fault::LetGo);
    bench.log.release(1);
    let counts = bench.copies.counts();
    assert_eq!((counts.flying, counts.queued, counts.bytes.get()), (0, 0, 0));
}

/// A device that sits on a batch for ever is as good as lost: after its silence nothing more is taken.
#[test]
fn a_silent_device_is_given_up() {
    let bench = bench(CopyLimits { silence_max: Duration::from_millis(100), ..limits() });
    bench.device.inject(Fault::Hold);
    bench.promote(1, 0, BLOCK, Duration::from_millis(10)).unwrap();
    assert!(matches!(bench.log.answer(1), Err(DeviceError::Late(_))));
    bench.promote(2, 0, BLOCK, SOON).unwrap();
    assert!(matches!(bench.log.answer(2), Err(DeviceError::Hung { .. })));
    assert!(matches!(bench.promote(3, 0, BLOCK, SOON), Err(DeviceError::Hung { .. })));
    bench.device.inject(Fault::LetGo);
    bench.log.release(1);
    bench.log.release(2);
}

/// An urgent copy must not wait behind a crowd of others: queue ten prefetches, then one decode, one batch at a time.
#[test]
fn urgent_copies_go_first() {
    let bench = bench(CopyLimits { flights_max: 1, ..limits() });
    bench.device.inject(Fault::Hold);
    for id in 0..11_u64 {
        let class = if id == 10 { IoClass::DecodeFetch } else { IoClass::Prefetch };
        let source = Span::Host(bench.memory.part(0, ByteCount::new(4096)).unwrap());
        let pieces = vec![Piece::new(source, on(&bench.chunk, 0, 4096)).unwrap()];
        bench.copies.submit(Job { id: JobId(id), class, pieces, within: SOON }).map_err(|r| r.error).unwrap();
        if id == 0 {
            bench.log.wait(|_| bench.copies.counts().flying == 1);
        }
    }
    bench.device.inject(Fault::LetGo);
    for id in 0..11 {
        bench.log.release(id);
    }
    let order = bench.log.order.lock().unwrap();
    let place = order.iter().position(|id| *id == JobId(10)).unwrap();
    assert!(place <= 2, "the urgent copy was number {place}: {order:?}");
}

/// Everything at once, seeded: held and failed copies, refused starts and registrations, short deadlines, two
/// directions. Each job is answered once and released once; nothing is left over; what is said to be done is there.
#[test]
fn storms_leave_nothing_behind() {
    let seeds: u64 =
        std::env::var("TERRACE_COPY_STORMS").ok().and_then(|text| text.parse().ok()).unwrap_or(30);
    for seed in 0..seeds {
        storm(seed);
    }
}

fn storm(seed: u64) {
    let bench = bench(limits());
    let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut draw = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    bench.memory.copy_from(&pattern(bench.memory.len(), usize::try_from(seed).unwrap()));
    if draw(2) == 0 {
        bench.device.inject(Fault::NoRegistration);
    }
    if draw(3) > 0 {
        bench.pinned.add(&bench.memory);
    }
    let mut taken = Vec::new();
    for id in 0..60 {
        match draw(8) {
            0 => bench.device.inject(Fault::Hold),
            1 | 2 => bench.device.inject(Fault::LetGo),
            3 => bench.device.inject(Fault::FailedCopy),
            4 => bench.device.inject(Fault::RefusedStart),
            _ => {}
        }
        let within = if draw(3) == 0 { Duration::from_micros(draw(2000)) } else { SOON };
        let offset = draw(CHUNK.get() - BLOCK);
        match bench.promote(id, offset, BLOCK, within) {
            Ok(()) => taken.push((id, offset)),
            Err(error) => assert!(matches!(error, DeviceError::Throttled { .. }), "seed {seed}: {error}"),
        }
    }
    bench.device.inject(Fault::LetGo);
    for (id, _) in &taken {
        bench.log.release(*id);
    }
    let done: Vec<_> = taken.iter().filter(|(id, _)| bench.log.answer(*id).is_ok()).collect();
    let all = host(CHUNK.get());
    bench.demote(1000, &all, 0, SOON).unwrap();
    while bench.log.answer(1000).is_err() {
        // A fault that was left over struck it.
        bench.log.ends.lock().unwrap().remove(&JobId(1000));
        bench.demote(1000, &all, 0, SOON).unwrap();
    }
    let (there, expected) = (contents(&all), contents(&bench.memory));
    for (id, offset) in done {
        let from = usize::try_from(*offset).unwrap();
        let to = from + usize::try_from(BLOCK).unwrap();
        assert!(
            there[from..to] == expected[from..to],
            "seed {seed}: job {id} was done and its bytes are not there"
        );
    }
    bench.log.release(1000);
    let counts = bench.copies.counts();
    assert_eq!((counts.flying, counts.queued, counts.bytes.get()), (0, 0, 0), "seed {seed}");
    bench.pinned.remove(&bench.memory);
    let room = bench.device.room().unwrap();
    assert_eq!((room.registrations, room.flights), (0, 0), "seed {seed}");
    assert_eq!(Arc::strong_count(&bench.chunk), 1, "seed {seed}: no copy keeps the chunk");
}
