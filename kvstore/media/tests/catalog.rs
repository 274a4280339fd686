//! The catalog against the devices: orders of writes, clears that are cut short, catalogs of another time, and
//! damage that is found while running. Each test names the guard that it watches.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use common::*;
use terrace_core::{BlockHeader, Done, Fault, UseStats, Via};
use terrace_media::{
    Access, Backend, BlockIo, CatalogState, DeviceConfig, FaultyDevice, Injected, IoOp, MediaConfig, MediaOp,
};

fn faulty(configuration: &mut MediaConfig) -> Arc<Mutex<Vec<Arc<FaultyDevice>>>> {
    let found = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&found);
    configuration.hooks.wrap_device = Some(Box::new(move |_, inner: Arc<dyn BlockIo>| {
        let device = Arc::new(FaultyDevice::new(inner));
        keep.lock().unwrap().push(Arc::clone(&device));
        device
    }));
    found
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn scan(store: &Store) -> Vec<terrace_core::BlockId> {
    let mut told = Vec::new();
    let report = store
        .media
        .scan(&mut |piece| told.extend(piece.blocks.iter().map(|found| found.header.block)))
        .unwrap();
    assert!(report.complete);
    told.sort();
    told
}

/// A restart could forget how blocks were used: statistics are put, and come back with the block.
#[test]
fn statistics_of_use_come_back() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    let stats = UseStats { depth: 77, turn: 3, uses: 200 };
    let put = vec![(disk(0, 1), header(1, b"x"), stats)];
    assert_eq!(store.run(|op| MediaOp::Commit { op, put, delete: vec![] }), Ok(Done::Plain));
    drop(store);
    let store = Store::open(&folder, Backend::Auto);
    let mut found = Vec::new();
    store.media.blocks(10, &mut |batch| found.extend(batch)).unwrap();
    assert_eq!(found.iter().map(|found| found.stats).collect::<Vec<_>>(), [stats]);
}

/// Superblock before catalog: a clear whose catalog fails is answered as failed, and its blocks must stay away
/// all the same, from the catalog that still names them and from a scan.
#[test]
fn a_clear_that_was_cut_short_stays_in_force() {
    let folder = folder();
    let fails = Arc::new(AtomicBool::new(false));
    let mut configuration = config(&folder, Backend::Auto);
    configuration.hooks.catalog_fails = Arc::clone(&fails);
    let mut store = Store::with(configuration).unwrap();
    store.media.put_space(record()).unwrap();
    store.chunk(1, Access::Pool);
    store.carve(0);
    store.persist(1, disk(0, 0));
    fails.store(true, Ordering::Release);
    let clear = |op| MediaOp::ClearSpace { op, space: space(), tenant: tenant(), generation: 2 };
    assert_eq!(store.run(clear), Err(Fault::Catalog));
    drop(store);
    let store = Store::open(&folder, Backend::Auto);
    assert!(store.known().is_empty(), "the catalog's entry is served");
    drop(store);
    std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
    let store = Store::open(&folder, Backend::Auto);
    assert!(scan(&store).is_empty(), "the header page is served");
}

/// A clear that reached one of two devices, or a device that comes back from an earlier time: what one
/// superblock knows of a clear must count for all.
#[test]
fn what_one_device_knows_of_a_clear_counts_for_all() {
    let folder = folder();
    let two = || {
        let mut configuration = config(&folder, Backend::Auto);
        configuration.devices.push(DeviceConfig { path: folder.path().join("nvme1.dat"), slots: 2 });
        configuration
    };
    let mut store = Store::with(two()).unwrap();
    store.media.put_space(record()).unwrap();
    store.chunk(1, Access::Pool);
    store.carve(0);
    store.persist(1, disk(0, 0));
    drop(store);
    let device = std::fs::File::options().read(true).write(true).open(device_path(&folder)).unwrap();
    let mut before = vec![0u8; 1 << 20];
    device.read_exact_at(&mut before, 0).unwrap();
    let mut store = Store::with(two()).unwrap();
    let clear = |op| MediaOp::ClearSpace { op, space: space(), tenant: tenant(), generation: 2 };
    assert_eq!(store.run(clear), Ok(Done::Plain));
    drop(store);
    device.write_all_at(&before, 0).unwrap();
    std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
    let store = Store::with(two()).unwrap();
    assert!(scan(&store).is_empty(), "the first device has forgotten the clear");
    drop(store);
    // From that start on it knows again.
    std::fs::remove_file(folder.path().join("nvme1.dat")).unwrap();
    let store = Store::with(two()).unwrap();
    assert_eq!(store.media.lowest_generation(tenant(), space()), 2);
}

/// A slot that is carved again is forgotten by the catalog before its header is written: a crash between the two
/// must not leave a catalog that contradicts the header. The header's write is held back to look.
#[test]
fn a_slot_is_forgotten_before_it_is_carved_again() {
    let folder = folder();
    let mut configuration = config(&folder, Backend::Auto);
    let devices = faulty(&mut configuration);
    let mut store = Store::with(configuration).unwrap();
    store.carve(0);
    let device = devices.lock().unwrap().pop().unwrap();
    device.hold();
    let other = terrace_core::SpaceId::from_bytes([9; 16]);
    let op = store.op();
    store.media.start(MediaOp::CarveSlot {
        op,
        device: terrace_core::DeviceId::new(0),
        slot: 0,
        space: other,
        frame_bytes: terrace_core::ByteCount::new(8192),
    });
    let deadline = Instant::now() + PATIENCE;
    while device.held() == 0 {
        assert!(Instant::now() < deadline, "the header is never written");
        std::thread::yield_now();
    }
    let copy = folder.path().join("copy");
    copy_folder(&folder.path().join("data/catalog"), &copy.join("catalog"));
    let catalog = terrace_media::inspect::OfflineCatalog::open(&copy).unwrap();
    assert!(catalog.report().unwrap().carves.is_empty(), "the catalog still names the old carving");
    device.release();
    assert_eq!(store.answer(), (op, Ok(Done::Plain)));
}

/// A catalog that was put back from an earlier time does not know what was written since: the superblock's later
/// life must tell, and a scan must find it.
#[test]
fn an_older_catalog_is_completed_by_a_scan() {
    let folder = folder();
    let (catalog, kept) = (folder.path().join("data/catalog"), folder.path().join("kept"));
    let mut store = Store::open(&folder, Backend::Auto);
    store.media.put_space(record()).unwrap();
    store.chunk(1, Access::Pool);
    store.carve(0);
    store.persist(1, disk(0, 0));
    drop(store);
    copy_folder(&catalog, &kept);
    let mut store = Store::open(&folder, Backend::Auto);
    assert!(!store.report.scan_needed);
    store.chunk(1, Access::Pool);
    store.persist(2, disk(0, 1));
    drop(store);
    std::fs::remove_dir_all(&catalog).unwrap();
    copy_folder(&kept, &catalog);
    let store = Store::open(&folder, Backend::Auto);
    assert_eq!(store.report.catalog, CatalogState::Opened);
    assert!(store.report.scan_needed, "{:?}", store.report);
    assert_eq!(scan(&store), [block(1), block(2)]);
    drop(store);
    let store = Store::open(&folder, Backend::Auto);
    assert!(!store.report.scan_needed);
    assert_eq!(store.known(), [block(1), block(2)]);
}

/// A scan whose catalog fails goes on after the repair, slot by slot, and tells nothing twice.
#[test]
fn a_scan_goes_on_after_a_failure() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Pool);
    for slot in 0..3 {
        store.carve(slot);
        store.persist(u8::try_from(slot + 1).unwrap(), disk(slot, 0));
    }
    drop(store);
    std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
    let fails = Arc::new(AtomicBool::new(false));
    let mut configuration = config(&folder, Backend::Auto);
    configuration.hooks.catalog_fails = Arc::clone(&fails);
    let store = Store::with(configuration).unwrap();
    fails.store(true, Ordering::Release);
    let mut told = Vec::new();
    store.media.scan(&mut |piece| told.push(piece.slot)).unwrap_err();
    assert!(told.is_empty(), "what is not in the catalog is not told");
    fails.store(false, Ordering::Release);
    store.media.reopen_catalog().unwrap();
    let report = store.media.scan(&mut |piece| told.push(piece.slot)).unwrap();
    assert!(report.complete);
    told.sort_unstable();
    assert_eq!(told, [0, 1, 2, 3]);
    assert_eq!(store.known(), [block(1), block(2), block(3)]);
    drop(store);
    assert!(!Store::open(&folder, Backend::Auto).report.scan_needed);
}

/// A scan that is ended early must not pass for a complete one.
#[test]
fn a_scan_that_is_stopped_is_not_complete() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Pool);
    store.carve(0);
    store.persist(1, disk(0, 0));
    drop(store);
    std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
    let store = Store::open(&folder, Backend::Auto);
    store.media.stop_scan();
    assert!(!store.media.scan(&mut |_| {}).unwrap().complete);
    drop(store);
    let store = Store::open(&folder, Backend::Auto);
    assert!(store.report.scan_needed);
    assert_eq!(scan(&store), [block(1)]);
}

/// A table that rots while the daemon runs cannot be reopened: the catalog must be replaced, and everything found
/// again, while the daemon goes on.
#[test]
fn a_catalog_that_rots_while_running_is_replaced() {
    let folder = folder();
    let catalog = folder.path().join("data/catalog");
    let mut store = Store::open(&folder, Backend::Auto);
    store.media.put_space(record()).unwrap();
    store.chunk(1, Access::Pool);
    store.carve(0);
    store.persist(1, disk(0, 0));
    drop(store);
    // Opening writes what the log held into a table.
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Pool);
    let mut rotten = 0;
    for entry in std::fs::read_dir(&catalog).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|kind| kind == "sst") {
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.write_all_at(&[0xff; 64], 0).unwrap();
            rotten += 1;
        }
    }
    assert!(rotten > 0, "there is no table to damage");
    let error = store.media.reopen_catalog().unwrap_err();
    assert!(error.is_damage(), "{error}");
    assert_eq!(store.commit(vec![], vec![block(9)]), Err(Fault::Catalog));
    store.media.renew_catalog().unwrap();
    assert_eq!(store.commit(vec![], vec![block(9)]), Ok(Done::Plain));
    assert!(store.known().is_empty());
    assert_eq!(scan(&store), [block(1)]);
    assert_eq!(store.known(), [block(1)]);
    let incarnation = store.report.incarnation;
    drop(store);
    let store = Store::open(&folder, Backend::Auto);
    assert!(!store.report.scan_needed && store.report.incarnation > incarnation);
    assert_eq!((store.report.spaces.clone(), store.report.carves.len()), (vec![record()], 1));
    assert_eq!(store.known(), [block(1)]);
    assert!(folder.path().join("data/catalog.damaged").exists());
}

/// A scrub must see what rotted, what was never written, and what lies there of another block; it must name an
/// unreadable device as such, and must not touch memory that is served.
#[test]
fn a_scrub_tells_whole_from_damaged() {
    for backend in BACKENDS {
        let folder = folder();
        let mut configuration = config(&folder, backend);
        let devices = faulty(&mut configuration);
        let mut store = Store::with(configuration).unwrap();
        store.chunk(1, Access::Pool);
        store.carve(0);
        let one = store.persist(1, disk(0, 0));
        let two = store.persist(2, disk(0, 1));
        let scrub = |store: &mut Store, source, expect: BlockHeader| {
            let source_offset = store.offset(source);
            store.run(|op| MediaOp::Scrub { op, source, source_offset, expect })
        };
        assert_eq!(scrub(&mut store, disk(0, 0), one), Ok(Done::Plain), "{backend:?}");
        assert_eq!(scrub(&mut store, disk(0, 1), one), Err(Fault::Checksum), "another block");
        assert_eq!(scrub(&mut store, disk(0, 5), one), Err(Fault::Checksum), "nothing is there");
        let file = std::fs::File::options().read(true).write(true).open(device_path(&folder)).unwrap();
        for at in [store.offset(disk(0, 0)) + 4096 + BLOCK_BYTES - 1, store.offset(disk(0, 0)) + 20] {
            let mut byte = [0u8];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
            assert_eq!(scrub(&mut store, disk(0, 0), one), Err(Fault::Checksum), "byte {at}");
            file.write_all_at(&byte, at).unwrap();
        }
        let device = devices.lock().unwrap().pop().unwrap();
        device.inject(IoOp::Read, Injected::Fail(Fault::Device));
        assert_eq!(scrub(&mut store, disk(0, 1), two), Err(Fault::Device));
        assert_eq!(scrub(&mut store, disk(0, 1), two), Ok(Done::Plain));
        for source_offset in [0, 4096, terrace_media::DATA_START, u64::MAX - 4095] {
            let outside = |op| MediaOp::Scrub { op, source: disk(0, 1), source_offset, expect: two };
            assert_eq!(store.run(outside), Err(Fault::Device), "byte {source_offset} is outside of its slot");
        }
        store.write(frame(1, 0), disk(0, 2), two, Via::Direct).unwrap();
        assert_eq!(store.payload(frame(1, 0)), payload(2), "the frame is as it was");
    }
}

/// A start must refuse a catalog of a newer format before it changes anything, devices included.
#[test]
fn a_newer_catalog_stops_the_start() {
    let folder = folder();
    drop(Store::open(&folder, Backend::Auto));
    std::fs::write(folder.path().join("data/catalog/FORMAT"), "terrace catalog 3.0\n").unwrap();
    let device = std::fs::read(device_path(&folder)).unwrap();
    let error = Store::with(config(&folder, Backend::Auto)).err().unwrap();
    assert!(error.to_string().contains("format 3"), "{error}");
    assert!(std::fs::read(device_path(&folder)).unwrap() == device);
    assert!(!folder.path().join("data/catalog.damaged").exists());
}
