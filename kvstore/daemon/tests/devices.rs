//! A device under a running daemon hangs and answers too late, or becomes a hundred times slower.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{PATIENCE, folder, keys, manifest, payload, payloads, socket};
use terrace_client::{Durability, MatchMode, SealOutcome, Session, Target, wire};
use terrace_core::{DeviceId, Fault};
use terrace_media::{BlockIo, FaultyDevice, Hooks, Injected, IoFacts, IoOp, IoRequest, SlowDevice};
use terraced::{Config, Daemon};

const BLOCKS: u32 = 40;
const BAD: DeviceId = DeviceId::new(1);
const IO_PATIENCE: Duration = Duration::from_millis(1500);

async fn start(folder: &Path, hooks: Hooks) -> Daemon {
    start_with(folder, hooks, "").await
}

async fn start_with(folder: &Path, hooks: Hooks, keys: &str) -> Daemon {
    let device = |n: u32| {
        let path = folder.join(format!("nvme{n}.dat"));
        format!("[[device]]\npath = \"{}\"\nbytes = \"64MiB\"\n", path.display())
    };
    let path = common::config(folder, &format!("{keys}{}{}", device(0), device(1)));
    Daemon::start(Config::read(&path).unwrap(), hooks).await.unwrap()
}

async fn session(folder: &Path) -> Session {
    let target = Target { socket: Some(socket(folder)), client_name: "test".to_owned(), ..Target::default() };
    Session::connect(&target).await.unwrap()
}

async fn info(daemon: &Daemon) -> wire::InfoResponse {
    let mut admin = terrace_client::admin(&format!("http://{}", daemon.grpc)).await.unwrap();
    admin.info(wire::InfoRequest {}).await.unwrap().into_inner()
}

/// Which blocks come; those that do must be right.
async fn read(session: &Session) -> Vec<bool> {
    read_first(session, BLOCKS).await
}

async fn read_first(session: &Session, count: u32) -> Vec<bool> {
    let space = session.open_space(&manifest(0)).await.unwrap();
    let keys = keys(count);
    let found = session.read_within(&space, &keys, Duration::from_secs(30)).await.unwrap();
    for (key, bytes) in keys.iter().zip(&found) {
        assert!(bytes.as_ref().is_none_or(|bytes| *bytes == payload(*key, 0)), "{key:?} has other bytes");
    }
    found.iter().map(Option::is_some).collect()
}

/// Blocks are striped over two devices, and one of them hangs while they are
/// read. The daemon could wait for it, lose its frames, or go on saying that it
/// has the blocks: the blocks of the other must come, those of the hanging one
/// be misses soon, and when it answers late, every frame be accounted for and
/// every block be there again.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_device_is_a_miss_and_comes_back() {
    let folder = folder();
    let daemon = start(folder.path(), Hooks::default()).await;
    {
        let session = session(folder.path()).await;
        let space = session.open_space(&manifest(0)).await.unwrap();
        let keys = keys(BLOCKS);
        let bytes = payloads(&keys, 0);
        // The first ones have slots carved on both devices; those go to the device that is quicker with it.
        for (part, parent) in [(0..4, None), (4..keys.len(), Some(keys[3].as_slice()))] {
            let (keys, bytes) = (&keys[part.clone()], &bytes[part]);
            let written = session.write(&space, keys, parent, bytes, Durability::Durable).await.unwrap();
            assert!(written.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{written:?}");
        }
    }
    daemon.stop().await;

    let found: Arc<Mutex<Option<Arc<FaultyDevice>>>> = Arc::default();
    let keep = Arc::clone(&found);
    let hooks = Hooks {
        wrap_device: Some(Box::new(move |device, inner| {
            if device != BAD {
                return inner;
            }
            let wrapped = Arc::new(FaultyDevice::new(inner));
            *keep.lock().unwrap() = Some(Arc::clone(&wrapped));
            wrapped
        })),
        io_patience: Some(IO_PATIENCE),
        ..Hooks::default()
    };
    let daemon = start(folder.path(), hooks).await;
    let bad = found.lock().unwrap().take().unwrap();
    let session = session(folder.path()).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    bad.hold();
    let began = Instant::now();
    let there = read(&session).await;
    let took = began.elapsed();
    assert!(took < IO_PATIENCE + Duration::from_secs(10), "the blocks were waited for {took:?}");
    let count = there.iter().filter(|there| **there).count();
    assert!((10..=30).contains(&count), "about half of the blocks lie on the other device: {there:?}");
    let turns = there.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(turns >= 15, "consecutive blocks lie on different devices: {there:?}");
    let (_, blocks) = session.exists(&[&space], &keys(BLOCKS), MatchMode::Set).await.unwrap();
    assert_eq!(blocks, there, "what the device has is no longer promised");
    let tiers = info(&daemon).await.tiers;
    let of_bad = tiers.iter().find(|tier| tier.device.ends_with("nvme1.dat")).unwrap();
    assert!(!of_bad.on && of_bad.note.contains("taken out"), "{of_bad:?}");
    let filling = tiers.iter().filter_map(|tier| tier.frames.as_ref()).map(|frames| frames.filling);
    assert!(filling.sum::<u64>() > 0, "the device still owns the frames of its reads");

    bad.release();
    let until = Instant::now() + PATIENCE;
    while !read(&session).await.iter().all(|there| *there) {
        assert!(Instant::now() < until, "the device is not back: {:?}", info(&daemon).await.tiers);
    }
    daemon.engine().view(terrace_core::Core::check);
    let info = info(&daemon).await;
    assert!(info.tiers.iter().all(|tier| tier.frames.as_ref().is_none_or(|frames| frames.filling == 0)));
    let late = info.tiers.iter().map(|tier| tier.late_answers).sum::<u64>();
    assert!(late > 0, "nothing came late: the test tested nothing");
    drop(session);
    daemon.stop().await;
}

/// Both superblocks of one of two devices are overwritten. The daemon could refuse to start, so that the good device
/// serves nobody, or take the bad one for a new one: it must start without it, say so, and touch nothing of it. When
/// its bytes are right again, all of its blocks are there, even if the catalog was lost meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn an_overwritten_device_keeps_no_other_from_serving() {
    const START: usize = 1 << 20;
    let folder = folder();
    let daemon = start(folder.path(), Hooks::default()).await;
    {
        let session = session(folder.path()).await;
        let space = session.open_space(&manifest(0)).await.unwrap();
        let keys = keys(BLOCKS);
        // The first ones have slots carved on both devices.
        for part in [&keys[..4], &keys[4..]] {
            let written = session.write(&space, part, None, &payloads(part, 0), Durability::Durable).await;
            assert!(written.unwrap().iter().all(|outcome| *outcome == SealOutcome::Sealed));
        }
    }
    let on_good = |info: &wire::InfoResponse| {
        let tier = info.tiers.iter().find(|tier| tier.device.ends_with("nvme0.dat")).unwrap();
        usize::try_from(tier.frames.as_ref().unwrap().sealed).unwrap()
    };
    let there = on_good(&info(&daemon).await);
    assert!((1..BLOCKS as usize).contains(&there), "{there} blocks lie on the good device");
    daemon.stop().await;
    let path = folder.path().join("nvme1.dat");
    let good = std::fs::read(&path).unwrap();
    let overwrite = |bytes: &[u8]| {
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
    };
    overwrite(&[0x55; START]);
    let bad = std::fs::read(&path).unwrap();
    for lost_catalog in [false, true] {
        if lost_catalog {
            std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
        }
        let daemon = start(folder.path(), Hooks::default()).await;
        let session = session(folder.path()).await;
        let until = Instant::now() + PATIENCE;
        // A scan may be under way.
        while {
            let count = read(&session).await.into_iter().filter(|there| *there).count();
            assert!(count < BLOCKS as usize, "the device was to be unreadable");
            count < there
        } {
            assert!(Instant::now() < until, "fewer than the {there} blocks of the other device");
        }
        let said = info(&daemon).await;
        let tier = said.tiers.iter().find(|tier| tier.device.ends_with("nvme1.dat")).unwrap();
        assert!(!tier.on && tier.note.contains("no Terrace device"), "{tier:?}");
        assert!(said.notes.iter().any(|note| note.contains("without a device")), "{:?}", said.notes);
        let space = session.open_space(&manifest(0)).await.unwrap();
        let more = keys(BLOCKS + 1 + u32::from(lost_catalog)).pop().unwrap();
        let bytes = payloads(std::slice::from_ref(&more), 0);
        let written = session.write(&space, &[more], None, &bytes, Durability::Durable).await.unwrap();
        assert_eq!(written, [SealOutcome::Sealed], "the other device takes blocks");
        daemon.engine().view(terrace_core::Core::check);
        drop(session);
        daemon.stop().await;
        assert!(std::fs::read(&path).unwrap() == bad, "the device was touched");
    }
    overwrite(&good[..START]);
    let daemon = start(folder.path(), Hooks::default()).await;
    let session = session(folder.path()).await;
    let until = Instant::now() + PATIENCE;
    while !read_first(&session, BLOCKS + 2).await.iter().all(|there| *there) {
        assert!(Instant::now() < until, "the device is not back: {:?}", info(&daemon).await.tiers);
    }
    drop(session);
    daemon.stop().await;
}

/// One of two devices becomes a hundred times slower and more. Every reader could wait for it from then on: it must be
/// taken out, its blocks be misses at once, those of the other come as before, and all be there again when it is quick.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundredfold_slower_device_does_not_slow_the_other() {
    const MANY: u32 = 96;
    let folder = folder();
    let daemon = start(folder.path(), Hooks::default()).await;
    {
        let session = session(folder.path()).await;
        let space = session.open_space(&manifest(0)).await.unwrap();
        for part in keys(MANY).chunks(8) {
            let bytes = payloads(part, 0);
            let written = session.write(&space, part, None, &bytes, Durability::Durable).await.unwrap();
            assert!(written.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{written:?}");
        }
    }
    daemon.stop().await;

    let found: Arc<Mutex<Option<Arc<SlowDevice>>>> = Arc::default();
    let keep = Arc::clone(&found);
    let hooks = Hooks {
        wrap_device: Some(Box::new(move |device, inner| {
            if device != BAD {
                return inner;
            }
            let wrapped = Arc::new(SlowDevice::new(inner));
            *keep.lock().unwrap() = Some(Arc::clone(&wrapped));
            wrapped
        })),
        ..Hooks::default()
    };
    // Memory for a quarter of the blocks: every pass reads from both devices. Written with so little, each
    // window would wait for the one before to be idle, which takes a minute.
    let daemon = start_with(folder.path(), hooks, "pinned_bytes = \"8MiB\"\nchunk_bytes = \"4MiB\"\n").await;
    let bad = found.lock().unwrap().take().unwrap();
    let session = session(folder.path()).await;
    // What it can do when it is well.
    for _ in 0..4 {
        assert!(read_first(&session, MANY).await.iter().all(|there| *there));
    }
    bad.delay(150_000);
    let of_bad = async || {
        let tiers = info(&daemon).await.tiers;
        tiers.into_iter().find(|tier| tier.device.ends_with("nvme1.dat")).unwrap()
    };
    let until = Instant::now() + PATIENCE;
    while of_bad().await.on {
        read_first(&session, MANY).await;
        assert!(Instant::now() < until, "it is still used: {:?}", of_bad().await);
    }
    assert!(of_bad().await.note.contains("times what they took"), "{:?}", of_bad().await);
    let began = Instant::now();
    let there = read_first(&session, MANY).await;
    let took = began.elapsed();
    assert!(took < Duration::from_secs(2), "the blocks were waited for {took:?}");
    let count = there.iter().filter(|there| **there).count();
    assert!(count > MANY as usize / 3 && count < MANY as usize, "those of the other device: {count}");

    bad.delay(0);
    let until = Instant::now() + PATIENCE;
    while !read_first(&session, MANY).await.iter().all(|there| *there) {
        assert!(Instant::now() < until, "the device is not back: {:?}", of_bad().await);
    }
    daemon.engine().view(terrace_core::Core::check);
    drop(session);
    daemon.stop().await;
}

/// Counts what is read.
struct CountingDevice {
    inner: Arc<dyn BlockIo>,
    reads: Arc<AtomicU64>,
}

impl BlockIo for CountingDevice {
    fn submit(&self, request: IoRequest) {
        self.reads.fetch_add(u64::from(matches!(request.op, IoOp::Read)), Ordering::SeqCst);
        self.inner.submit(request);
    }

    fn facts(&self) -> IoFacts {
        self.inner.facts()
    }
}

/// Blocks are on devices only. Asking whether they exist could read them, or their headers: both forms of the question
/// must answer from memory, over both transports.
#[tokio::test(flavor = "multi_thread")]
async fn exists_touches_no_device() {
    let folder = folder();
    let daemon = start(folder.path(), Hooks::default()).await;
    {
        let session = session(folder.path()).await;
        let space = session.open_space(&manifest(0)).await.unwrap();
        let keys = keys(BLOCKS);
        let bytes = payloads(&keys, 0);
        session.write(&space, &keys, None, &bytes, Durability::Durable).await.unwrap();
    }
    daemon.stop().await;
    let reads = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&reads);
    let hooks = Hooks {
        wrap_device: Some(Box::new(move |_, inner| {
            Arc::new(CountingDevice { inner, reads: Arc::clone(&counted) })
        })),
        ..Hooks::default()
    };
    let daemon = start_with(folder.path(), hooks, "scrub_bytes_per_second = \"0\"\n").await;
    let pinned = info(&daemon).await.tiers[0].frames.map_or(0, |frames| frames.sealed);
    assert_eq!(pinned, 0, "the blocks are in memory already: nothing is tested");
    let remote = Target { grpc: Some(format!("http://{}", daemon.grpc)), ..Target::default() };
    let before = reads.load(Ordering::SeqCst);
    for session in [session(folder.path()).await, Session::connect(&remote).await.unwrap()] {
        let space = session.open_space(&manifest(0)).await.unwrap();
        for mode in [MatchMode::Prefix, MatchMode::Set] {
            let (there, blocks) = session.exists(&[&space], &keys(BLOCKS), mode).await.unwrap();
            assert!(there == BLOCKS as usize && blocks.iter().all(|there| *there), "{blocks:?}");
            let found = session.match_blocks(&[&space], &keys(BLOCKS), mode).await.unwrap();
            assert!(found.blocks.iter().all(|block| block.present && block.tier == wire::Tier::Nvme));
        }
    }
    assert_eq!(reads.load(Ordering::SeqCst), before, "a device was read");
    let session = session(folder.path()).await;
    assert!(read(&session).await.iter().all(|there| *there));
    assert!(reads.load(Ordering::SeqCst) > before, "reads are not counted: nothing was tested");
    drop(session);
    daemon.stop().await;
}

fn overwrite(path: &Path, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
}

/// Blocks on both devices, durable, by a daemon that has stopped.
async fn written(folder: &Path) -> Vec<[u8; 4]> {
    let daemon = start(folder, Hooks::default()).await;
    let (session, keys) = (session(folder).await, keys(BLOCKS));
    assert!(write_all(&session, &keys, 0).await.iter().all(|outcome| *outcome == SealOutcome::Sealed));
    drop(session);
    daemon.stop().await;
    keys
}

async fn write_all(session: &Session, keys: &[[u8; 4]], life: u8) -> Vec<SealOutcome> {
    let space = session.open_space(&manifest(0)).await.unwrap();
    let mut outcomes = Vec::new();
    // The first ones have slots carved on both devices.
    for part in
        [&keys[..keys.len().min(4)], &keys[keys.len().min(4)..]].into_iter().filter(|part| !part.is_empty())
    {
        let written = session.write(&space, part, None, &payloads(part, life), Durability::Durable).await;
        outcomes.extend(written.unwrap());
    }
    outcomes
}

/// A space is cleared while one of two devices is out. The clear could be refused until the device is back, hang, keep
/// what is written from being durable, or be forgotten by the device, which then brings the blocks back: they must stay
/// away when it is there again, even if the catalog was lost, and even when it is asked alone from then on.
#[tokio::test(flavor = "multi_thread")]
async fn a_space_is_cleared_while_a_device_is_out() {
    let folder = folder();
    let keys = written(folder.path()).await;
    let path = folder.path().join("nvme1.dat");
    let good = std::fs::read(&path).unwrap();
    overwrite(&path, &[0x55; 1 << 20]);

    let daemon = start(folder.path(), Hooks::default()).await;
    let session = session(folder.path()).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    assert!(session.clear(&space).await.unwrap() > 0);
    assert!(read(&session).await.iter().all(|there| !there), "a block is there after the clear");
    let another = keys[0];
    let sealed = tokio::time::timeout(PATIENCE, write_all(&session, &[another], 0)).await;
    assert_eq!(sealed.unwrap(), [SealOutcome::Sealed], "the other device takes blocks");
    drop(session);
    daemon.stop().await;

    overwrite(&path, &good[..1 << 20]);
    for alone in [false, true] {
        std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
        if alone {
            std::fs::remove_file(folder.path().join("nvme0.dat")).unwrap();
        }
        let daemon = start(folder.path(), Hooks::default()).await;
        let session = self::session(folder.path()).await;
        let until = Instant::now() + PATIENCE;
        while !info(&daemon).await.notes.iter().any(|note| note.contains("rebuilt")) {
            assert!(Instant::now() < until, "the scan does not end: {:?}", info(&daemon).await.notes);
            tokio::task::yield_now().await;
        }
        let there = read(&session).await;
        assert_eq!(there[0], !alone, "what was written after the clear");
        assert!(there[1..].iter().all(|there| !there), "the device brought blocks back: {there:?}");
        drop(session);
        daemon.stop().await;
    }
}

/// No device can record a clear. It could drop the blocks all the same and then wait for ever, with everybody who
/// writes: it must be refused before anything is dropped, with the device's name and what to do.
#[tokio::test(flavor = "multi_thread")]
async fn a_clear_that_no_device_can_record_changes_nothing() {
    let folder = folder();
    start(folder.path(), Hooks::default()).await.stop().await;
    for number in 0..2 {
        overwrite(&folder.path().join(format!("nvme{number}.dat")), &[0x55; 1 << 20]);
    }
    let daemon = start(folder.path(), Hooks::default()).await;
    let session = session(folder.path()).await;
    let keys = keys(2);
    assert!(write_all(&session, &keys, 0).await.iter().all(|outcome| *outcome == SealOutcome::NotDurable));
    let space = session.open_space(&manifest(0)).await.unwrap();
    let refused = session.clear(&space).await.unwrap_err().to_string();
    assert!(refused.contains("nvme1.dat") && refused.contains("start the daemon again"), "{refused}");
    assert_eq!(read_first(&session, 2).await, [true, true]);
    assert!(
        write_all(&session, &[[9; 4]], 0).await.iter().all(|outcome| *outcome == SealOutcome::NotDurable)
    );
    daemon.engine().view(terrace_core::Core::check);
    drop(session);
    daemon.stop().await;
}

/// A device of a daemon whose faults are planned before anything is read or written.
fn faulty(plan: impl Fn(&FaultyDevice) + Send + 'static) -> (Hooks, Arc<Mutex<Option<Arc<FaultyDevice>>>>) {
    let found: Arc<Mutex<Option<Arc<FaultyDevice>>>> = Arc::default();
    let keep = Arc::clone(&found);
    let hooks = Hooks {
        wrap_device: Some(Box::new(move |device, inner| {
            if device != BAD {
                return inner;
            }
            let wrapped = Arc::new(FaultyDevice::new(inner));
            plan(&wrapped);
            *keep.lock().unwrap() = Some(Arc::clone(&wrapped));
            wrapped
        })),
        ..Hooks::default()
    };
    (hooks, found)
}

/// Blocks do not come, and their reader over gRPC leaves, or asks for many. The stream could be kept for as long as they
/// might be waited for, and keep others out; and the time could begin anew with each part of the blocks.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_waits_no_longer_than_its_reader() {
    let folder = folder();
    let keys = written(folder.path()).await;

    let (hooks, found) = faulty(|_| {});
    let hooks = Hooks { io_patience: Some(PATIENCE), ..hooks };
    let daemon = start_with(folder.path(), hooks, "[limits]\nstreams = 1\n").await;
    let bad = found.lock().unwrap().take().unwrap();
    bad.hold();
    let grpc = Some(format!("http://{}", daemon.grpc));
    let session = Session::connect(&Target { grpc, ..Target::default() }).await.unwrap();
    let space = session.open_space(&manifest(0)).await.unwrap();
    let leaving = session.read_within(&space, &keys, Duration::from_secs(50));
    assert!(
        tokio::time::timeout(Duration::from_millis(500), leaving).await.is_err(),
        "the device was to hang"
    );
    let began = Instant::now();
    while let Err(throttled) = session.read_within(&space, &keys[..1], Duration::ZERO).await {
        assert!(began.elapsed() < Duration::from_secs(15), "the stream is kept: {throttled}");
    }
    let began = Instant::now();
    session.read_within(&space, &keys, Duration::from_secs(2)).await.unwrap();
    let took = began.elapsed();
    assert!(took < Duration::from_millis(3500), "two seconds for all blocks: {took:?}");
    bad.release();
    drop((session, space));
    daemon.stop().await;
}

/// The catalog was lost, and one of two devices fails to sync, or never answers that: what it holds could be taken for
/// durable, or nothing of any device be looked for. The other's blocks must be served and new ones go to it, the daemon
/// say what it left out, and the next start find that.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_cannot_be_synced_is_left_out_of_the_scan() {
    let folder = folder();
    written(folder.path()).await;
    for (round, fault) in [Injected::Fail(Fault::Device), Injected::Hang].into_iter().enumerate() {
        std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
        let (hooks, found) = faulty(move |device| {
            // That of the superblock is well.
            device.inject(IoOp::Sync, Injected::Slow(1));
            device.inject(IoOp::Sync, fault);
        });
        let hooks = Hooks { sync_patience: Some(IO_PATIENCE), ..hooks };
        let daemon = start(folder.path(), hooks).await;
        let bad = found.lock().unwrap().take().unwrap();
        let session = session(folder.path()).await;
        let until = Instant::now() + PATIENCE;
        let there = loop {
            let there = read(&session).await.into_iter().filter(|there| *there).count();
            if info(&daemon).await.notes.iter().any(|note| note.contains("could not be synced")) && there > 0
            {
                break there;
            }
            assert!(Instant::now() < until, "{there} blocks: {:?}", info(&daemon).await);
        };
        assert!(there < BLOCKS as usize, "{there}");
        let said = info(&daemon).await;
        assert!(said.scan_done < 1.0, "not all is known");
        let tier = said.tiers.iter().find(|tier| tier.device.ends_with("nvme1.dat")).unwrap();
        assert!(!tier.on && tier.note.contains("ejected until the daemon starts again"), "{tier:?}");
        let new = keys(BLOCKS + 1 + u32::try_from(round).unwrap()).pop().unwrap();
        assert_eq!(
            write_all(&session, &[new], 0).await,
            [SealOutcome::Sealed],
            "the other device takes blocks"
        );
        daemon.engine().view(terrace_core::Core::check);
        bad.release();
        drop((session, bad));
        daemon.stop().await;
        let daemon = start(folder.path(), Hooks::default()).await;
        let session = self::session(folder.path()).await;
        let until = Instant::now() + PATIENCE;
        while !read(&session).await.iter().all(|there| *there) {
            assert!(Instant::now() < until, "what was left out is not found: {:?}", info(&daemon).await);
        }
        drop(session);
        daemon.stop().await;
    }
}
