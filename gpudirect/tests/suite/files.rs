//! cuFile over a library that is built for the test: what is given to it, and what
//! happens when it is missing, refuses, lies or hangs.

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, MIB};
use terrace_gpudirect::{
    Chunk, Cuda, Device, DeviceBytes, DeviceError, Ends, FileJob, FileLimits, FileOperation, Gds, GdsFile,
    HostBytes, HostOnly, JobId, Span, Submission, log_to, measure_files,
};

use crate::common::{CHUNK, contents, copy, host, on, pattern};
use crate::copies::{Log, SOON};
use crate::fake::{self, Driver, faults};

const BLOCK: u64 = 368_640;
const LIMITS: FileLimits = FileLimits { threads: 2, jobs_max: 64, silence_max: Duration::from_millis(200) };

fn live() -> String {
    type Live = unsafe extern "C" fn(*mut u8, usize);
    let mut text = [0_u8; 256];
    // SAFETY: the stand-in is loaded by now, the function has this type, and writes at most so many bytes.
    unsafe {
        let library = libc::dlopen(c"libcufile.so.0".as_ptr(), libc::RTLD_NOW);
        let live = libc::dlsym(library, c"fake_files_live".as_ptr());
        assert!(!live.is_null());
        std::mem::transmute::<*mut libc::c_void, Live>(live)(text.as_mut_ptr(), text.len());
    }
    let end = text.iter().position(|byte| *byte == 0).unwrap();
    String::from_utf8(text[..end].to_vec()).unwrap()
}

struct Bench {
    submission: Submission,
    device: Arc<dyn Device>,
    gds: Gds,
    log: Arc<Log>,
    file: Arc<GdsFile>,
    chunk: Arc<Chunk>,
}

fn bench(submission: Submission) -> Bench {
    let device: Arc<dyn Device> = Arc::new(Cuda::open(0).unwrap());
    let log = Arc::new(Log::default());
    let gds = Gds::open(&device, LIMITS, Arc::clone(&log) as Arc<dyn Ends>).unwrap();
    assert!(gds.info().is_direct && gds.info().module_version == (2, 25));
    assert_eq!(gds.info().direct_bytes_max, 16 * MIB);
    let path = fake::scratch().join(format!("blocks-{}", std::process::id()));
    let mut options = std::fs::File::options();
    options.read(true).write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT);
    let file = options.open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let memory = HostBytes::anonymous(CHUNK).unwrap();
    memory.copy_from(&pattern(memory.len(), 3));
    // SAFETY: the memory is this function's alone, and no store happens while the slice lives.
    file.write_all_at(unsafe { std::slice::from_raw_parts(memory.as_ptr(), memory.len()) }, 0).unwrap();
    let file = gds.file(file).unwrap();
    let chunk = device.create(CHUNK).unwrap();
    Bench { submission, device, gds, log, file, chunk }
}

impl Bench {
    fn submit(
        &self,
        id: u64,
        operation: FileOperation,
        offset: u64,
        within: Duration,
    ) -> Result<(), DeviceError> {
        let bytes = DeviceBytes::new(Arc::clone(&self.chunk), offset, ByteCount::new(BLOCK)).unwrap();
        let (submission, file) = (self.submission, Arc::clone(&self.file));
        let job = FileJob { id: JobId(id), operation, submission, file, offset, bytes, within };
        self.gds.submit(job).map_err(|refused| {
            assert!(refused.job.id == JobId(id), "a refused job comes back");
            refused.error
        })
    }

    fn on_device(&self) -> Vec<u8> {
        let buffer = host(CHUNK.get());
        copy(&*self.device, on(&self.chunk, 0, CHUNK.get()), Span::Host(buffer.clone())).unwrap();
        contents(&buffer)
    }

    /// Ends everything, and expects nothing to be left.
    fn end(self) {
        let Self { gds, file, .. } = self;
        drop((file, gds));
        // Threads end, and their streams with them, after the engine.
        let began = Instant::now();
        while live() != "handles=0 buffers=0 batches=0 streams=0" {
            assert!(began.elapsed() < SOON, "{}", live());
            std::thread::yield_now();
        }
    }
}

fn moves(submission: Submission) {
    let bench = bench(submission);
    let prepared = bench.gds.prepare(&bench.chunk).unwrap();
    let blocks = CHUNK.get() / BLOCK;
    for id in 0..blocks {
        bench.submit(id, FileOperation::Read, id * BLOCK, SOON).unwrap();
    }
    for id in 0..blocks {
        bench.log.answer(id).unwrap();
        bench.log.release(id);
    }
    let all = usize::try_from(blocks * BLOCK).unwrap();
    assert!(bench.on_device()[..all] == pattern(all, 3), "bytes of the file");
    // Others into the chunk, from there to the file, and back.
    let other = host(CHUNK.get());
    other.copy_from(&pattern(other.len(), 4));
    copy(&*bench.device, Span::Host(other.clone()), on(&bench.chunk, 0, CHUNK.get())).unwrap();
    bench.submit(100, FileOperation::Write, BLOCK, SOON).unwrap();
    bench.log.answer(100).unwrap();
    other.copy_from(&vec![0; other.len()]);
    copy(&*bench.device, Span::Host(other), on(&bench.chunk, 0, CHUNK.get())).unwrap();
    bench.submit(101, FileOperation::Read, BLOCK, SOON).unwrap();
    bench.log.answer(101).unwrap();
    let (from, to) = (usize::try_from(BLOCK).unwrap(), usize::try_from(2 * BLOCK).unwrap());
    assert!(bench.on_device()[from..to] == pattern(to, 4)[from..], "what was written is read");
    bench.log.release(101);
    drop(prepared);
    bench.end();
}

fn fails(submission: Submission) {
    let bench = bench(submission);
    let words = match submission {
        Submission::Calls => ["file_error", "file_short"],
        Submission::Batches => ["file_error", "no_submit"],
        Submission::Streams => ["file_error", "no_submit"],
    };
    for (id, word) in (0..).zip(words) {
        faults(word);
        bench.submit(id, FileOperation::Read, 0, SOON).unwrap();
        let error = bench.log.answer(id).unwrap_err();
        assert!(matches!(error, DeviceError::Driver { .. }), "{word}: {error}");
        bench.log.release(id);
    }
    faults("no_handle");
    let refused = bench.gds.file(std::fs::File::open("/dev/null").unwrap()).unwrap_err();
    assert!(matches!(refused, DeviceError::Driver { call: "cuFileHandleRegister", .. }), "{refused}");
    faults("no_buffer");
    bench.gds.prepare(&bench.chunk).unwrap_err();
    faults("");
    bench.submit(9, FileOperation::Read, 0, SOON).unwrap();
    bench.log.answer(9).unwrap();
    bench.log.release(9);
    bench.end();
}

/// What streams can do wrong: none at all, half moved, nothing told, one of several not taken, and a driver that says
/// late that a stream has passed.
fn streams_fail() {
    let bench = bench(Submission::Streams);
    for (id, word) in [(1, "no_stream"), (2, "file_short"), (3, "untold")] {
        faults(word);
        bench.submit(id, FileOperation::Read, 0, SOON).unwrap();
        let error = bench.log.answer(id).unwrap_err();
        assert!(matches!(error, DeviceError::Driver { .. }), "{word}: {error}");
        bench.log.release(id);
    }
    // Both threads wait for a driver that does not say that their streams have passed.
    faults("hold");
    for id in [10, 11] {
        bench.submit(id, FileOperation::Read, 0, Duration::from_millis(50)).unwrap();
        assert!(matches!(bench.log.answer(id), Err(DeviceError::Late(_))), "the driver does not hold");
        assert!(!bench.log.is_released(id), "the stream has not passed it");
    }
    faults("");
    bench.log.release(10);
    bench.log.release(11);
    // One of two is not taken: the other one is as it should be.
    faults("no_second_submit");
    bench.submit(20, FileOperation::Read, 0, SOON).unwrap();
    bench.submit(21, FileOperation::Read, BLOCK, SOON).unwrap();
    bench.log.answer(20).unwrap();
    assert!(matches!(bench.log.answer(21), Err(DeviceError::Driver { call: "cuFileReadAsync", .. })));
    faults("");
    let unaligned = DeviceBytes::new(Arc::clone(&bench.chunk), 0, ByteCount::new(100)).unwrap();
    let (operation, submission, file) = (FileOperation::Read, Submission::Streams, Arc::clone(&bench.file));
    let job =
        FileJob { id: JobId(30), operation, submission, file, offset: 0, bytes: unaligned, within: SOON };
    let refused = bench.gds.submit(job).unwrap_err();
    assert!(matches!(refused.error, DeviceError::BadJob { .. }), "{}", refused.error);
    drop(refused);
    bench.log.release(20);
    bench.log.release(21);
    bench.end();
}

/// A driver that is lost under a transfer does not end it: the library does.
fn a_lost_stream() {
    let bench = bench(Submission::Streams);
    faults("hold");
    bench.submit(1, FileOperation::Read, 0, Duration::from_millis(50)).unwrap();
    assert!(matches!(bench.log.answer(1), Err(DeviceError::Late(_))));
    faults("hold lost");
    bench.submit(2, FileOperation::Read, 0, Duration::from_millis(100)).unwrap();
    // The second thread has no stream from a lost driver, which ends its job at once.
    bench.log.answer(2).unwrap_err();
    bench.log.release(2);
    assert!(!bench.log.is_released(1), "nobody said that the library is done with it");
    let kept = bench.device.replace(Arc::clone(&bench.chunk)).unwrap_err();
    assert!(matches!(kept.error, DeviceError::InUse { .. }));
    faults("");
    bench.log.release(1);
    bench.end();
}

/// A library before 1.7 serves calls and batches, and says why it has no streams.
fn old() {
    let bench = bench(Submission::Streams);
    bench.gds.offers(Submission::Calls).unwrap();
    bench.gds.offers(Submission::Batches).unwrap();
    let refused = bench.submit(1, FileOperation::Read, 0, SOON).unwrap_err();
    assert!(
        matches!(&refused, DeviceError::Unsupported { what } if what.contains("no cuFileReadAsync")),
        "{refused}"
    );
    let blocks = [ByteCount::new(BLOCK)];
    let choice = measure_files(&bench.device, &fake::scratch(), &blocks, SOON).unwrap();
    let rate = &choice.rates[0];
    assert!(rate.by(Submission::Calls).is_some() && rate.by(Submission::Batches).is_some(), "{rate:?}");
    assert_eq!(rate.by(Submission::Streams), None);
    bench.end();
}

fn hangs(submission: Submission) {
    let bench = bench(submission);
    faults("file_hang");
    bench.submit(1, FileOperation::Read, 0, Duration::from_millis(50)).unwrap();
    assert!(matches!(bench.log.answer(1), Err(DeviceError::Late(_))));
    assert!(!bench.log.is_released(1), "the library may still write into the chunk");
    // The second thread hangs too, and the next one waits behind both.
    bench.submit(2, FileOperation::Write, 0, Duration::from_millis(50)).unwrap();
    assert!(matches!(bench.log.answer(2), Err(DeviceError::Late(_))));
    bench.submit(3, FileOperation::Read, 0, Duration::from_millis(300)).unwrap();
    assert!(matches!(bench.log.answer(3), Err(DeviceError::Late(_))));
    bench.log.release(3);
    let refused = bench.submit(4, FileOperation::Read, 0, SOON).unwrap_err();
    assert!(matches!(refused, DeviceError::Hung { .. }), "{refused}");
    let kept = bench.device.replace(Arc::clone(&bench.chunk)).unwrap_err();
    assert!(matches!(kept.error, DeviceError::InUse { .. }));
    faults("");
    bench.log.release(1);
    bench.log.release(2);
    bench.submit(5, FileOperation::Read, 0, SOON).unwrap();
    bench.log.answer(5).unwrap();
    bench.log.release(5);
    assert_eq!(bench.gds.under_way(), 0);
    bench.end();
}

fn measures() {
    let device: Arc<dyn Device> = Arc::new(Cuda::open(0).unwrap());
    let folder = &fake::scratch();
    let blocks = [ByteCount::new(BLOCK), ByteCount::new(2 * MIB)];
    let choice = measure_files(&device, folder, &blocks, SOON).unwrap();
    for rate in &choice.rates {
        for submission in Submission::ALL {
            assert!(rate.by(submission).is_some_and(|rate| rate > 1e6), "{rate:?}");
        }
        let bounce = *rate.bounce.as_ref().unwrap();
        assert!(bounce > 1e6, "{rate:?}");
        let (best, direct) = rate.best().unwrap();
        assert!(Submission::ALL.iter().all(|of| rate.by(*of) <= Some(direct)), "{rate:?}");
        assert_eq!(choice.submission(rate.block), Some(best).filter(|_| direct > bounce));
    }
    assert_eq!(choice.submission(ByteCount::new(4096)), choice.rates[0].choice());
    // Ways that are quick and wrong or quick and idle, one that fails, and one that hangs: each time the other one is taken.
    for word in ["file_lies", "file_idle", "file_error", "file_hang", "no_handle", "no_module"] {
        faults(word);
        let time = if word == "file_hang" { Duration::from_secs(3) } else { SOON };
        let choice = measure_files(&device, folder, &blocks[1..], time).unwrap();
        assert!(choice.rates[0].direct.iter().all(|(_, rate)| rate.is_err()), "{word}: {choice:?}");
        assert!(choice.rates[0].bounce.is_ok(), "{word}: {choice:?}");
        assert_eq!(choice.submission(blocks[1]), None, "{word}: {choice:?}");
        faults("");
    }
    // Only one manner fails: the others are still measured.
    for (word, broken) in [("no_stream", Submission::Streams), ("no_batch", Submission::Batches)] {
        faults(word);
        let choice = measure_files(&device, folder, &blocks[1..], SOON).unwrap();
        for submission in Submission::ALL {
            assert_eq!(choice.rates[0].by(submission).is_none(), submission == broken, "{word}: {choice:?}");
        }
        faults("");
    }
}

/// Runs in a process of its own, under the tests below.
#[test]
fn in_child() {
    let Some(part) = fake::part() else { return };
    match part.as_str() {
        "files-move" => Submission::ALL.into_iter().for_each(moves),
        "files-fail" => Submission::ALL.into_iter().for_each(fails),
        "files-hang-calls" => hangs(Submission::Calls),
        "files-hang-batches" => hangs(Submission::Batches),
        "files-hang-streams" => hangs(Submission::Streams),
        "files-streams" => streams_fail(),
        "files-lost" => a_lost_stream(),
        "files-old" => old(),
        "files-measure" => measures(),
        "no-files" => {
            let device: Arc<dyn Device> = Arc::new(Cuda::open(0).unwrap());
            let ends = Arc::new(Log::default()) as Arc<dyn Ends>;
            let refused = Gds::open(&device, LIMITS, ends).unwrap_err();
            assert!(matches!(refused, DeviceError::NoDriver { .. }), "{refused}");
        }
        _ => return,
    }
    fake::ran(&part);
}

/// Offsets, lengths or files could be mixed up between us and the library: blocks there and back, by calls and batches.
#[test]
fn files_and_chunks_agree() {
    fake::run("files::in_child", "files-move", Driver::Fake);
}

/// A failed or short transfer must cost one job and leave no handle.
#[test]
fn failed_transfers_leave_nothing() {
    fake::run("files::in_child", "files-fail", Driver::Fake);
}

/// A library that hangs could take deadlines or chunks with it: hang every thread, see answers, see memory kept, let go.
#[test]
fn a_hanging_library_keeps_chunks_and_nobody_waiting() {
    fake::run("files::in_child", "files-hang-calls", Driver::Fake);
    fake::run("files::in_child", "files-hang-batches", Driver::Fake);
    fake::run("files::in_child", "files-hang-streams", Driver::Fake);
}

/// A stream could end a transfer that its library still runs, or one failure take others with it: refuse, shorten, hold,
/// lose the driver, and see each answered as it is and released when it may be.
#[test]
fn streams_end_nothing_that_goes_on() {
    fake::run("files::in_child", "files-streams", Driver::Fake);
    fake::run("files::in_child", "files-lost", Driver::Fake);
}

/// An old library could be refused as a whole, or called where it has nothing.
#[test]
fn an_old_library_has_no_streams_and_serves() {
    fake::run("files::in_child", "files-old", Driver::Fake);
}

/// The self-test could choose a way that lies, fails or hangs.
#[test]
fn the_self_test_trusts_no_library() {
    fake::run("files::in_child", "files-measure", Driver::Fake);
}

/// Without the library, without a device, or without a place for its log there must be an answer, and no file in the
/// working directory.
#[test]
fn without_the_library_there_is_an_answer() {
    fake::run("files::in_child", "no-files", Driver::Fake);
    let device: Arc<dyn Device> = Arc::new(HostOnly::new(0, CHUNK).unwrap());
    let ends = Arc::new(Log::default()) as Arc<dyn Ends>;
    let refused = Gds::open(&device, LIMITS, ends).unwrap_err();
    assert!(matches!(refused, DeviceError::Unsupported { .. }), "{refused}");
    if std::env::var_os("CUFILE_LOGFILE_PATH").is_none() {
        let refused = log_to(Path::new("somewhere")).unwrap_err();
        assert!(matches!(refused, DeviceError::Unsupported { .. }), "other threads run: {refused}");
    }
    assert!(!Path::new("cufile.log").exists());
}
