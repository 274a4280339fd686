//! cuFile over a library that is built for the test: what is given to it, and what
//! happens when it is missing, refuses, lies or hangs.

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

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
    device: Arc<dyn Device>,
    gds: Gds,
    log: Arc<Log>,
    file: Arc<GdsFile>,
    chunk: Arc<Chunk>,
}

fn bench(submission: Submission) -> Bench {
    let device: Arc<dyn Device> = Arc::new(Cuda::open(0).unwrap());
    let log = Arc::new(Log::default());
    let gds = Gds::open(&device, submission, LIMITS, Arc::clone(&log) as Arc<dyn Ends>).unwrap();
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
    Bench { device, gds, log, file, chunk }
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
        let file = Arc::clone(&self.file);
        let job = FileJob { id: JobId(id), operation, file, offset, bytes, within };
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
        let Self { device: _, gds, log: _, file, chunk: _ } = self;
        drop((file, gds));
        assert_eq!(live(), "handles=0 buffers=0 batches=0");
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
    for submission in [Submission::Calls, Submission::Batches] {
        let choice = measure_files(&device, folder, &blocks, submission, SOON).unwrap();
        for rate in &choice.rates {
            assert!(rate.direct.as_ref().is_ok_and(|rate| *rate > 1e6), "{rate:?}");
            assert!(rate.bounce.as_ref().is_ok_and(|rate| *rate > 1e6), "{rate:?}");
            assert_eq!(choice.is_direct(rate.block), rate.is_direct());
        }
        assert_eq!(choice.is_direct(ByteCount::new(4096)), choice.rates[0].is_direct());
    }
    // A way that is quick and wrong, one that fails, and one that hangs: each time the other one is taken.
    for word in ["file_lies", "file_error", "file_hang", "no_handle", "no_module"] {
        faults(word);
        let time = if word == "file_hang" { Duration::from_secs(3) } else { SOON };
        let choice = measure_files(&device, folder, &blocks[1..], Submission::Calls, time).unwrap();
        assert!(choice.rates[0].direct.is_err(), "{word}: {choice:?}");
        assert!(!choice.is_direct(blocks[1]), "{word}: {choice:?}");
        faults("");
    }
}

/// Runs in a process of its own, under the tests below.
#[test]
fn in_child() {
    let Some(part) = fake::part() else { return };
    match part.as_str() {
        "files-move" => [Submission::Calls, Submission::Batches].into_iter().for_each(moves),
        "files-fail" => [Submission::Calls, Submission::Batches].into_iter().for_each(fails),
        "files-hang-calls" => hangs(Submission::Calls),
        "files-hang-batches" => hangs(Submission::Batches),
        "files-measure" => measures(),
        "no-files" => {
            let device: Arc<dyn Device> = Arc::new(Cuda::open(0).unwrap());
            let ends = Arc::new(Log::default()) as Arc<dyn Ends>;
            let refused = Gds::open(&device, Submission::Calls, LIMITS, ends).unwrap_err();
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
    let refused = Gds::open(&device, Submission::Calls, LIMITS, ends).unwrap_err();
    assert!(matches!(refused, DeviceError::Unsupported { .. }), "{refused}");
    if std::env::var_os("CUFILE_LOGFILE_PATH").is_none() {
        let refused = log_to(Path::new("somewhere")).unwrap_err();
        assert!(matches!(refused, DeviceError::Unsupported { .. }), "other threads run: {refused}");
    }
    assert!(!Path::new("cufile.log").exists());
}
