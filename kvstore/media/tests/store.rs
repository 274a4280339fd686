//! One store, end to end: blocks go to a device and come back, are found again
//! after a restart, and a damaged one is never taken for a block.

mod common;

use std::fs::Permissions;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::*;
use terrace_core::{Done, Fault, Fence, Via};
use terrace_media::{Access, Backend, CatalogState, DeviceConfig, MediaError, MediaOp};

/// A backend could lose, shift or mix up bytes: blocks are written directly and
/// by bounce, and read back into other frames, through each backend.
#[test]
fn blocks_come_back_as_they_were() {
    for backend in BACKENDS {
        let folder = folder();
        let mut store = Store::open(&folder, backend);
        store.chunk(1, Access::Pool);
        store.chunk(2, Access::Window);
        store.carve(0);
        for (number, chunk, via) in [(1u8, 1, Via::Direct), (2, 2, Via::Bounce)] {
            let (source, target) = (frame(chunk, 0), disk(0, u32::from(number)));
            let bytes = payload(number);
            store.fill(source, &bytes);
            let header = header(number, &bytes);
            assert_eq!(store.write(source, target, header, via), Ok(Done::Plain), "{backend:?}");
            assert_eq!(store.commit(vec![(target, header)], vec![]), Ok(Done::Plain));
            assert_eq!(store.read(target, frame(1, 5), header), Ok(Done::Plain), "{backend:?}");
            assert_eq!(store.payload(frame(1, 5)), bytes);
        }
        assert_eq!(store.known(), vec![block(1), block(2)]);
        assert!(store.media.facts().devices[0].backend.contains(match backend {
            Backend::Pread => "pread",
            _ => "io_uring",
        }));
    }
}

/// A restart could forget blocks, spaces or carvings, or repeat an incarnation.
#[test]
fn a_restart_finds_everything_again() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    assert_eq!(store.report.catalog, CatalogState::New);
    assert!(!store.report.scan_needed, "new devices hold nothing");
    store.media.put_space(record()).unwrap();
    store.chunk(1, Access::Pool);
    store.carve(2);
    let header = store.persist(1, disk(2, 3));
    let incarnation = store.report.incarnation;
    store.media.close().unwrap();

    let mut store = Store::open(&folder, Backend::Auto);
    assert_eq!(store.report.catalog, CatalogState::Opened);
    assert!(store.report.clean && !store.report.scan_needed);
    assert!(store.report.incarnation > incarnation);
    assert_eq!(store.report.spaces, vec![record()]);
    assert_eq!(store.report.carves.len(), 1);
    assert_eq!((store.report.carves[0].slot, store.report.carves[0].space), (2, space()));
    assert_eq!(store.known(), vec![block(1)]);
    store.chunk(1, Access::Pool);
    assert_eq!(store.read(disk(2, 3), frame(1, 7), header), Ok(Done::Plain));
    assert_eq!(store.payload(frame(1, 7)), payload(1));
}

/// Without the catalog nothing would be known: it is deleted, and the scan must
/// find every block, the carving and the space, and write them down for the next start.
#[test]
fn a_deleted_catalog_is_rebuilt_by_a_scan() {
    for backend in BACKENDS {
        let folder = folder();
        let mut store = Store::open(&folder, backend);
        store.media.put_space(record()).unwrap();
        store.chunk(1, Access::Pool);
        store.carve(1);
        for number in 1..=5 {
            store.persist(number, disk(1, u32::from(number)));
        }
        let incarnation = store.report.incarnation;
        drop(store);
        std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();

        let store = Store::open(&folder, backend);
        assert!(store.report.scan_needed);
        assert!(store.report.incarnation > incarnation, "the superblock remembers it");
        drop(store);
        let store = Store::open(&folder, backend);
        assert!(store.report.scan_needed, "a start without a complete scan does not count");
        let mut pieces = Vec::new();
        let report = store.media.scan(&mut |piece| pieces.push(piece)).unwrap();
        assert_eq!((report.slots, report.blocks, report.damaged, report.unreadable), (4, 5, 0, 0));
        let found = pieces.iter().find(|piece| piece.slot == 1).unwrap();
        assert_eq!(found.space, Some(record()));
        assert_eq!(found.blocks.len(), 5);
        assert_eq!(found.blocks[2].header, header(3, &payload(3)));
        assert_eq!(store.known().len(), 5);
        drop(store);
        let store = Store::open(&folder, backend);
        assert!(!store.report.scan_needed);
        assert_eq!(store.known().len(), 5);
        assert_eq!(store.report.spaces, vec![record()]);
    }
}

/// A catalog that does not read back must not stop the daemon or lose blocks:
/// its files are overwritten, and it must be moved aside and rebuilt.
#[test]
fn a_damaged_catalog_is_moved_aside() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Pool);
    store.carve(0);
    store.persist(1, disk(0, 0));
    drop(store);
    for entry in std::fs::read_dir(folder.path().join("data/catalog")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|kind| kind == "log") {
            let mut bytes = std::fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x40;
            std::fs::write(&path, bytes).unwrap();
        }
    }
    let store = Store::open(&folder, Backend::Auto);
    assert!(matches!(store.report.catalog, CatalogState::Damaged { .. }), "{:?}", store.report.catalog);
    assert!(store.report.scan_needed);
    assert_eq!(store.media.scan(&mut |_| {}).unwrap().blocks, 1);
    assert_eq!(store.known(), vec![block(1)]);
}

/// A scan could bring back what was cleared: a space is cleared, the catalog is
/// lost, and only the block written afterwards may be found.
#[test]
fn a_scan_never_resurrects_a_cleared_generation() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.media.put_space(record()).unwrap();
    store.chunk(1, Access::Pool);
    store.carve(0);
    store.persist(1, disk(0, 0));
    let cleared = store.run(|op| MediaOp::ClearSpace { op, space: space(), tenant: tenant(), generation: 2 });
    assert_eq!(cleared, Ok(Done::Plain));
    assert!(store.known().is_empty());
    let bytes = payload(2);
    let mut newer = header(2, &bytes);
    newer.generation = 2;
    newer.checksum = terrace_core::checksum(newer.block, 2, &bytes);
    store.fill(frame(1, 0), &bytes);
    assert_eq!(store.write(frame(1, 0), disk(0, 1), newer, Via::Direct), Ok(Done::Plain));
    assert_eq!(store.commit(vec![(disk(0, 1), newer)], vec![]), Ok(Done::Plain));
    drop(store);
    std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
    let store = Store::open(&folder, Backend::Auto);
    let (mut spaces, mut told) = (Vec::new(), Vec::new());
    let report = store
        .media
        .scan(&mut |piece| {
            spaces.extend(piece.space);
            told.extend(piece.blocks.iter().map(|found| found.header.block));
        })
        .unwrap();
    assert_eq!((told, report.blocks), (vec![block(2)], 1));
    assert_eq!(store.known(), vec![block(2)]);
    assert_eq!(spaces[0].generation, 2, "the space must not start from an old generation");
}

/// A device may hold two copies of a block: the one that was written later
/// counts, in whatever order a scan meets them.
#[test]
fn a_scan_keeps_the_later_copy() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Pool);
    store.carve(0);
    let bytes = payload(1);
    store.fill(frame(1, 0), &bytes);
    for (index, write_sequence) in [(2, 5), (0, 4), (4, 3)] {
        let header = terrace_core::BlockHeader { write_sequence, ..header(1, &bytes) };
        assert_eq!(store.write(frame(1, 0), disk(0, index), header, Via::Direct), Ok(Done::Plain));
        assert_eq!(store.commit(vec![], vec![]), Ok(Done::Plain));
    }
    drop(store);
    std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
    let store = Store::open(&folder, Backend::Auto);
    assert_eq!(store.media.scan(&mut |_| {}).unwrap().blocks, 3);
    let mut found = Vec::new();
    store.media.blocks(10, &mut |batch| found.extend(batch)).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].frame, found[0].header.write_sequence), (disk(0, 2), 5));
}

/// A slot that is carved for another size must be found as it is now, by the
/// catalog and by a scan, and blocks of the earlier carving must not come back.
#[test]
fn a_slot_carved_again_is_found_as_it_is_now() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Pool);
    store.carve(0);
    store.persist(1, disk(0, 0));
    assert_eq!(store.commit(vec![], vec![block(1)]), Ok(Done::Plain));
    let other = terrace_core::SpaceId::from_bytes([9; 16]);
    let frame_bytes = terrace_core::ByteCount::new(8192);
    let device = terrace_core::DeviceId::new(0);
    let carved = store.run(|op| MediaOp::CarveSlot { op, device, slot: 0, space: other, frame_bytes });
    assert_eq!(carved, Ok(Done::Plain));
    drop(store);
    let store = Store::open(&folder, Backend::Auto);
    assert_eq!(store.report.carves.len(), 1);
    assert_eq!((store.report.carves[0].space, store.report.carves[0].frame_bytes), (other, frame_bytes));
    drop(store);
    std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
    let store = Store::open(&folder, Backend::Auto);
    let mut pieces = Vec::new();
    store.media.scan(&mut |piece| pieces.push(piece)).unwrap();
    let first = pieces.iter().find(|piece| piece.slot == 0).unwrap();
    assert_eq!(first.carve.map(|carve| carve.space), Some(other));
    assert!(pieces.iter().all(|piece| piece.blocks.is_empty()));
}

/// A wrong offset must never reach a superblock, a slot header or a neighbour's slot.
#[test]
fn writes_stay_inside_their_slot() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Pool);
    let bytes = payload(1);
    store.fill(frame(1, 0), &bytes);
    let header = header(1, &bytes);
    let before = std::fs::read(device_path(&folder)).unwrap();
    let slot = terrace_media::DATA_START + CHUNK_BYTES;
    for target_offset in [0, 4096, slot, slot - 4096, slot + CHUNK_BYTES - 4096, u64::MAX - 4095] {
        for via in [Via::Direct, Via::Bounce] {
            let wrote = store.run(|op| MediaOp::Write {
                op,
                source: frame(1, 0),
                target: disk(1, 0),
                target_offset,
                header,
                via,
                class: terrace_core::IoClass::Persistence,
            });
            assert_eq!(wrote, Err(Fault::Device), "offset {target_offset}");
        }
    }
    assert!(std::fs::read(device_path(&folder)).unwrap() == before);
}

/// Damage on the device must be a fault, never other bytes: one bit is flipped
/// in the payload, then in the header page, then the block of another key is put there.
#[test]
fn damage_is_a_checksum_fault() {
    for backend in BACKENDS {
        let folder = folder();
        let mut store = Store::open(&folder, backend);
        store.chunk(1, Access::Pool);
        store.carve(0);
        let header = store.persist(1, disk(0, 0));
        store.persist(2, disk(0, 1));
        let (first, second) = (store.offset(disk(0, 0)), store.offset(disk(0, 1)));
        let device = std::fs::File::options().read(true).write(true).open(device_path(&folder)).unwrap();
        for at in [first + 4096 + BLOCK_BYTES - 1, first + 4096, first + 90, first + 4000] {
            let mut byte = [0u8];
            device.read_exact_at(&mut byte, at).unwrap();
            device.write_all_at(&[byte[0] ^ 1], at).unwrap();
            assert_eq!(store.read(disk(0, 0), frame(1, 3), header), Err(Fault::Checksum), "byte {at}");
            device.write_all_at(&byte, at).unwrap();
            assert_eq!(store.read(disk(0, 0), frame(1, 3), header), Ok(Done::Plain), "byte {at}");
        }
        // The right payload under a header that is not the one that was written last: a lost write.
        let newer = terrace_core::BlockHeader { write_sequence: header.write_sequence + 1, ..header };
        assert_eq!(store.read(disk(0, 0), frame(1, 3), newer), Err(Fault::Checksum));
        let mut other = vec![0; usize::try_from(FRAME_BYTES).unwrap()];
        device.read_exact_at(&mut other, second).unwrap();
        device.write_all_at(&other, first).unwrap();
        assert_eq!(store.read(disk(0, 0), frame(1, 3), header), Err(Fault::Checksum));
    }
}

/// A data file that lost its end must give faults for the blocks there, and the
/// next start must go on with it.
#[test]
fn a_truncated_device_loses_only_its_end() {
    for backend in BACKENDS {
        let folder = folder();
        let mut store = Store::open(&folder, backend);
        store.chunk(1, Access::Pool);
        store.carve(0);
        store.carve(3);
        let kept = store.persist(1, disk(0, 0));
        let lost = store.persist(2, disk(3, 5));
        let device = std::fs::File::options().write(true).open(device_path(&folder)).unwrap();
        // In the middle of the second block: its read is cut short, then empty.
        device.set_len(store.offset(disk(3, 5)) + 8192).unwrap();
        assert_eq!(store.read(disk(0, 0), frame(1, 3), kept), Ok(Done::Plain));
        assert_eq!(store.read(disk(3, 5), frame(1, 3), lost), Err(Fault::Device));
        drop(store);
        let mut store = Store::open(&folder, backend);
        assert!(store.report.notes.iter().any(|note| note.contains("missing")), "{:?}", store.report.notes);
        store.chunk(1, Access::Pool);
        assert_eq!(store.read(disk(0, 0), frame(1, 3), kept), Ok(Done::Plain));
        assert_eq!(store.read(disk(3, 5), frame(1, 3), lost), Err(Fault::Checksum));
    }
}

/// A bounced write must not persist what a client changed after its seal.
#[test]
fn a_changed_window_is_not_written() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Window);
    store.carve(0);
    let bytes = payload(1);
    let header = header(1, &bytes);
    store.fill(frame(1, 0), &bytes);
    store.fill(frame(1, 0), b"changed");
    assert_eq!(store.write(frame(1, 0), disk(0, 0), header, Via::Bounce), Err(Fault::Checksum));
    let verify = store.run(|op| MediaOp::Verify { op, frame: frame(1, 0), expect: header });
    assert_eq!(verify, Err(Fault::Checksum));
    store.chunk(2, Access::Pool);
    let copy = |op| MediaOp::Copy { op, source: frame(1, 0), target: frame(2, 1), expect: header };
    assert_eq!(store.run(copy), Err(Fault::Checksum));
    store.fill(frame(1, 0), &bytes);
    assert_eq!(store.run(copy), Ok(Done::Plain));
    assert_eq!(store.payload(frame(2, 1)), bytes);
}

/// Two daemons on one directory would destroy each other's blocks.
#[test]
fn a_second_daemon_is_turned_away() {
    let folder = folder();
    let store = Store::open(&folder, Backend::Auto);
    let error = Store::with(config(&folder, Backend::Auto)).err().unwrap();
    assert!(
        matches!(&error, MediaError::InUse { pid, .. } if *pid == std::process::id().to_string()),
        "{error}"
    );
    let mut elsewhere = config(&folder, Backend::Auto);
    elsewhere.data_dir = folder.path().join("other");
    let error = Store::with(elsewhere).err().unwrap();
    assert!(matches!(error, MediaError::InUse { .. }), "the device is locked as well: {error}");
    drop(store);
    Store::open(&folder, Backend::Auto);
}

/// Whoever can open the lock can hold it, and the catalog says whose blocks there are: neither is for other users,
/// nor stays so after an earlier version.
#[test]
fn lock_and_catalog_are_the_owners_alone() {
    let folder = folder();
    let data = folder.path().join("data");
    let mode = |name: &str| std::fs::metadata(data.join(name)).unwrap().permissions().mode() & 0o777;
    for _ in 0..2 {
        drop(Store::open(&folder, Backend::Auto));
        assert_eq!((mode("lock"), mode("catalog")), (0o600, 0o700));
        for (name, wide) in [("lock", 0o644), ("catalog", 0o755)] {
            std::fs::set_permissions(data.join(name), Permissions::from_mode(wide)).unwrap();
        }
    }
}

/// One file under two names would be two devices that overwrite each other's blocks.
#[test]
fn one_file_is_not_two_devices() {
    let folder = folder();
    let mut twice = config(&folder, Backend::Auto);
    let link = folder.path().join("link.dat");
    std::os::unix::fs::symlink(&twice.devices[0].path, &link).unwrap();
    twice.devices.push(DeviceConfig { path: link, slots: twice.devices[0].slots });
    let error = Store::with(twice).err().unwrap().to_string();
    assert!(error.contains("two devices of the configuration are one file"), "{error}");
}

/// A wrong setting must not overwrite a device: another node, another chunk
/// size, and a file that is not ours are refused, and nothing changes.
#[test]
fn foreign_devices_are_refused_untouched() {
    let folder = folder();
    drop(Store::open(&folder, Backend::Auto));
    let before = std::fs::read(device_path(&folder)).unwrap();
    let mut other_node = config(&folder, Backend::Auto);
    other_node.node = [8; 16];
    assert!(matches!(Store::with(other_node).err().unwrap(), MediaError::OtherNode { .. }));
    let mut other_size = config(&folder, Backend::Auto);
    other_size.chunk_bytes = terrace_core::ByteCount::new(2 * CHUNK_BYTES);
    assert!(matches!(Store::with(other_size).err().unwrap(), MediaError::OtherChunkBytes { .. }));
    assert!(std::fs::read(device_path(&folder)).unwrap() == before);
    std::fs::write(device_path(&folder), vec![b'x'; 3 << 20]).unwrap();
    let mut fresh = config(&folder, Backend::Auto);
    fresh.data_dir = folder.path().join("fresh");
    assert!(matches!(Store::with(fresh).err().unwrap(), MediaError::NotOurs { .. }));
    assert_eq!(std::fs::metadata(device_path(&folder)).unwrap().len(), 3 << 20);
}

/// The only device is overwritten. A node that has served from it could keep its memory from serving as well: it
/// starts, and begins no new life of a catalog that it cannot rebuild.
#[test]
fn an_overwritten_only_device_leaves_the_memory() {
    let folder = folder();
    drop(Store::open(&folder, Backend::Auto));
    std::fs::write(device_path(&folder), vec![b'x'; 3 << 20]).unwrap();
    let store = Store::open(&folder, Backend::Auto);
    let facts = store.media.facts();
    assert!(!facts.devices[0].usable && !facts.devices[0].opened, "{facts:?}");
    assert!(store.report.incarnation > 1 && store.report.carves.is_empty());
    drop(store);
    assert!(std::fs::read(device_path(&folder)).unwrap().iter().all(|byte| *byte == b'x'));
    std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
    let refused = Store::with(config(&folder, Backend::Auto));
    assert!(matches!(refused.err().unwrap(), MediaError::NotOurs { .. }), "lives would be counted anew");
}

/// A device of another node beside a good one: its owner must be able to open it meanwhile, and nothing of it may
/// change. A newer format is refused, whatever else there is.
#[test]
fn a_device_of_another_node_is_left_to_it() {
    let folder = folder();
    let path = folder.path().join("other.dat");
    let mut owner = config(&folder, Backend::Auto);
    (owner.node, owner.data_dir) = ([8; 16], folder.path().join("owner"));
    owner.devices[0].path.clone_from(&path);
    drop(Store::with(owner).unwrap());
    let before = std::fs::read(&path).unwrap();
    let both = || {
        let mut config = config(&folder, Backend::Auto);
        config.devices.push(DeviceConfig { path: path.clone(), slots: 4 });
        config
    };
    let mut store = Store::with(both()).unwrap();
    assert_eq!(
        store.media.facts().devices.iter().map(|device| device.usable).collect::<Vec<_>>(),
        [true, false]
    );
    assert!(std::fs::File::open(&path).unwrap().try_lock().is_ok(), "its owner cannot open it");
    let cleared = store.run(|op| MediaOp::ClearSpace { op, space: space(), tenant: tenant(), generation: 2 });
    assert_eq!(cleared, Ok(Done::Plain), "the good device and the catalog know of it");
    drop(store);
    assert!(std::fs::read(&path).unwrap() == before);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&9u32.to_le_bytes(), 8).unwrap();
    file.write_all_at(b"TERRSUP1", 0).unwrap();
    assert!(matches!(Store::with(both()).err().unwrap(), MediaError::NewerFormat { found: 9, .. }));
}

/// A device that replaced another one must not be asked for the old one's blocks.
#[test]
fn a_replaced_device_is_forgotten() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Pool);
    store.carve(0);
    store.persist(1, disk(0, 0));
    drop(store);
    std::fs::remove_file(device_path(&folder)).unwrap();
    std::fs::File::create(device_path(&folder)).unwrap();
    let store = Store::open(&folder, Backend::Auto);
    assert!(store.known().is_empty() && store.report.carves.is_empty());
    assert!(!store.report.scan_needed);
    assert!(store.report.notes.iter().any(|note| note.contains("replaced")));
}

/// After a failed batch nothing may be acknowledged until the catalog has been
/// reopened; then everything works again, and the failed change is not there.
#[test]
fn a_failed_catalog_takes_nothing_until_it_is_reopened() {
    let folder = folder();
    let mut configuration = config(&folder, Backend::Auto);
    let fails = Arc::new(AtomicBool::new(false));
    configuration.hooks.catalog_fails = Arc::clone(&fails);
    let mut store = Store::with(configuration).unwrap();
    store.chunk(1, Access::Pool);
    store.carve(0);
    let one = store.persist(1, disk(0, 0));
    fails.store(true, Ordering::Release);
    let two = header(2, &payload(2));
    assert_eq!(store.commit(vec![(disk(0, 1), two)], vec![]), Err(Fault::Catalog));
    fails.store(false, Ordering::Release);
    assert_eq!(store.commit(vec![(disk(0, 1), two)], vec![]), Err(Fault::Catalog));
    assert!(!store.media.facts().catalog_usable);
    assert_eq!(store.read(disk(0, 0), frame(1, 3), one), Ok(Done::Plain), "reads go on");
    store.media.reopen_catalog().unwrap();
    assert!(store.media.facts().catalog_usable);
    assert_eq!(store.known(), vec![block(1)]);
    assert_eq!(store.commit(vec![], vec![block(1)]), Ok(Done::Plain));
    assert!(store.known().is_empty());
}

/// Many commits that wait together must share their batches, or each would cost
/// a sync; all of them must be there afterwards.
#[test]
fn waiting_commits_share_batches() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    let (commits, batches) = store.media.facts().commits;
    for number in 0..200u8 {
        let op = store.op();
        let put = puts(vec![(disk(0, u32::from(number)), header(number, b"x"))]);
        store.media.start(MediaOp::Commit { op, put, delete: vec![] });
    }
    for _ in 0..200 {
        assert_eq!(store.answer().1, Ok(Done::Plain));
    }
    let (commits_after, batches_after) = store.media.facts().commits;
    assert_eq!(commits_after - commits, 200);
    assert!(batches_after - batches < 200, "{} batches", batches_after - batches);
    assert_eq!(store.known().len(), 200);
}

/// A commit that deletes and puts one block means its move to another frame.
#[test]
fn delete_and_put_of_one_block_leaves_it() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    let header = header(1, b"x");
    assert_eq!(store.commit(vec![(disk(0, 1), header)], vec![block(1)]), Ok(Done::Plain));
    assert_eq!(store.known(), vec![block(1)]);
}

/// A fence that is set must be seen at once, in the page that readers map.
#[test]
fn fences_start_at_one_and_move() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Pool);
    let memory = store.media.chunk(terrace_core::ChunkId::new(1)).unwrap();
    assert!((0..8).all(|index| memory.fence(index) == Fence::new(1)));
    store.media.set_fence(frame(1, 4), Fence::new(9));
    assert_eq!(memory.fence(4), Fence::new(9));
    let page = std::fs::File::from(memory.share_fences().unwrap());
    let mut bytes = [0u8; 8];
    page.read_exact_at(&mut bytes, 32).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 9);
}

/// Operations that name what is not there are answered, not ignored: the core waits for each.
#[test]
fn impossible_operations_are_answered() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    let header = header(1, &payload(1));
    assert_eq!(store.read(disk(0, 0), frame(99, 0), header), Err(Fault::NoMemory));
    store.chunk(1, Access::Pool);
    assert_eq!(store.read(disk(0, 0), frame(1, 99), header), Err(Fault::Device));
    let far = MediaOp::Read {
        op: store.op(),
        source: terrace_core::DiskFrame { device: terrace_core::DeviceId::new(9), slot: 0, index: 0 },
        source_offset: 1 << 20,
        target: frame(1, 0),
        expect: header,
        class: terrace_core::IoClass::DecodeFetch,
    };
    store.media.start(far);
    assert_eq!(store.answer().1, Err(Fault::Device));
    let mut long = header;
    long.length = terrace_core::ByteCount::new(FRAME_BYTES);
    assert_eq!(store.read(disk(0, 0), frame(1, 0), long), Err(Fault::Checksum));
    let huge = store.run(|op| MediaOp::CreateChunk {
        op,
        chunk: terrace_core::ChunkId::new(2),
        access: Access::Pool,
        frame_bytes: terrace_core::ByteCount::new(1 << 30),
        frames: 1 << 20,
    });
    assert_eq!(huge, Err(Fault::NoMemory));
    let gone = store.run(|op| MediaOp::DropChunk { op, chunk: terrace_core::ChunkId::new(77) });
    assert_eq!(gone, Ok(Done::Plain));
}
