//! Looking at a store while no daemon runs: what is whole is told as it is, what is damaged is found, whatever the
//! damage, and nothing is changed.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use common::*;
use proptest::prelude::*;
use terrace_core::{BlockHeader, Done, Via};
use terrace_media::inspect::{
    CheckOptions, CheckReport, EntryFilter, FindingKind, OfflineCatalog, OfflineDevice, check,
};
use terrace_media::{Access, Backend, CopyState, MediaError, MediaOp, encode_header};

const OPTIONS: CheckOptions = CheckOptions { payloads: true, findings_max: 100 };

fn data_dir(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("data")
}

fn checked(folder: &tempfile::TempDir) -> CheckReport {
    let catalog = OfflineCatalog::open(&data_dir(folder)).unwrap();
    let device = OfflineDevice::open(&device_path(folder)).unwrap();
    check(&[device], Some(&catalog), OPTIONS).unwrap()
}

/// A store with five blocks in slot 1, the last of them evicted, and its daemon gone.
fn filled() -> (tempfile::TempDir, Vec<u64>) {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.media.put_space(record()).unwrap();
    store.chunk(1, Access::Pool);
    store.carve(1);
    for number in 1..=5 {
        store.persist(number, disk(1, u32::from(number)));
    }
    assert_eq!(store.commit(vec![], vec![block(5)]), Ok(Done::Plain));
    let offsets = (0..=5).map(|index| store.offset(disk(1, index))).collect();
    store.media.close().unwrap();
    (folder, offsets)
}

fn kinds(report: &CheckReport) -> Vec<(FindingKind, u64)> {
    report.counts.iter().map(|(kind, count)| (*kind, *count)).collect()
}

/// A report that is wrong about a healthy store would send an operator after ghosts: everything that was written
/// is told, and an evicted block is ordinary.
#[test]
fn a_whole_store_is_told_as_it_is() {
    let (folder, offsets) = filled();
    let report = checked(&folder);
    assert!(!report.is_damaged(), "{report:?}");
    assert_eq!((report.slots, report.carved, report.blocks, report.entries), (4, 1, 5, Some(4)));
    assert_eq!(kinds(&report), [(FindingKind::FrameWithoutEntry, 1)]);
    let catalog = OfflineCatalog::open(&data_dir(&folder)).unwrap();
    let told = catalog.report().unwrap();
    assert_eq!((told.format, told.clean, told.rebuild), ((2, 0), true, false));
    assert_eq!(told.spaces.values().collect::<Vec<_>>(), [&record()]);
    assert_eq!((told.carves.len(), told.blocks[&space()].0), (1, 4));
    let entries = catalog.entries(&EntryFilter { slot: Some(1), ..EntryFilter::default() }, 2).unwrap();
    assert_eq!(entries.iter().map(|entry| entry.header.block).collect::<Vec<_>>(), [block(1), block(2)]);
    let filter = EntryFilter { block: Some(block(3)), ..EntryFilter::default() };
    assert_eq!(catalog.entries(&filter, 9).unwrap()[0].frame, disk(1, 3));
    assert!(catalog.entries(&EntryFilter { slot: Some(0), ..EntryFilter::default() }, 9).unwrap().is_empty());
    let device = OfflineDevice::open(&device_path(&folder)).unwrap();
    assert!(device.copies().iter().all(|copy| matches!(copy, CopyState::Valid(_))));
    assert_eq!(device.superblock.as_ref().unwrap().node, [7; 16]);
    let frame = device.frame(1, 2).unwrap();
    assert_eq!((frame.offset, frame.payload), (Some(offsets[2]), Some(true)));
    assert_eq!(frame.header, Some(Ok(header(2, &payload(2)))));
    assert!(device.frame(1, 0).unwrap().header.unwrap().is_err());
    assert!(device.frame(9, 0).unwrap_err().to_string().contains("no slot 9"));
    assert!(device.frame(1, 4000).unwrap_err().to_string().contains("no frame 4000"));
}

/// Each kind of damage must be found and named, or an operator would trust a store that is not whole.
#[test]
fn every_damage_is_found() {
    let (folder, offsets) = filled();
    let file = std::fs::File::options().read(true).write(true).open(device_path(&folder)).unwrap();
    let size = usize::try_from(FRAME_BYTES).unwrap();
    let mut kept = vec![0u8; size];
    let slot = terrace_media::DATA_START + CHUNK_BYTES;
    let mut slot_page = vec![0u8; 4096];
    file.read_exact_at(&mut slot_page, slot).unwrap();
    let older = BlockHeader { write_sequence: 0, ..header(2, &payload(2)) };
    let mut older_page = vec![0u8; 4096];
    encode_header(&older, &mut older_page);
    let mut second = vec![0u8; size];
    file.read_exact_at(&mut second, offsets[2]).unwrap();
    let cases: [(u64, Vec<u8>, &[FindingKind]); 8] = [
        (offsets[1] + 4096 + 77, vec![0xee], &[FindingKind::DamagedPayload]),
        (offsets[1] + 20, vec![0xee], &[FindingKind::DamagedHeader, FindingKind::EntryWithoutFrame]),
        (offsets[1], vec![0; 4096], &[FindingKind::EntryWithoutFrame]),
        (offsets[2], older_page, &[FindingKind::EntryDiffers]),
        (offsets[3], second, &[FindingKind::OtherBlock, FindingKind::Duplicate]),
        (slot + 9, vec![0xee], &[FindingKind::DamagedSlot, FindingKind::EntryWithoutFrame]),
        (slot, vec![0; 4096], &[FindingKind::CarveDiffers, FindingKind::EntryWithoutFrame]),
        (slot - CHUNK_BYTES, slot_page, &[FindingKind::MisdirectedSlot]),
    ];
    for (at, bytes, expected) in cases {
        kept.resize(bytes.len(), 0);
        file.read_exact_at(&mut kept, at).unwrap();
        file.write_all_at(&bytes, at).unwrap();
        let report = checked(&folder);
        assert!(report.is_damaged(), "byte {at}: {report:?}");
        for kind in expected {
            assert!(report.counts.contains_key(kind), "byte {at}: no {kind:?} in {report:?}");
            assert!(report.findings.iter().any(|finding| finding.kind == *kind));
        }
        file.write_all_at(&kept, at).unwrap();
        assert!(!checked(&folder).is_damaged(), "byte {at} was put back");
    }
}

/// Generations that were cleared are told apart from what the catalog merely forgot.
#[test]
fn cleared_blocks_are_named_as_such() {
    let (folder, _) = filled();
    let mut store = Store::open(&folder, Backend::Auto);
    let clear = |op| MediaOp::ClearSpace { op, space: space(), tenant: tenant(), generation: 2 };
    assert_eq!(store.run(clear), Ok(Done::Plain));
    drop(store);
    assert_eq!(kinds(&checked(&folder)), [(FindingKind::Cleared, 5)]);
}

/// Two programs on one store would see each other's halves: while a daemon has it, inspection is refused by its
/// process number; while it is inspected, a daemon does not start.
#[test]
fn a_running_daemon_and_inspection_exclude_each_other() {
    let (folder, _) = filled();
    let store = Store::open(&folder, Backend::Auto);
    let pid = std::process::id().to_string();
    for error in [
        OfflineCatalog::open(&data_dir(&folder)).err().unwrap(),
        OfflineDevice::open(&device_path(&folder)).err().unwrap(),
    ] {
        assert!(matches!(&error, MediaError::InUse { pid: owner, .. } if *owner == pid), "{error}");
    }
    drop(store);
    let _catalog = OfflineCatalog::open(&data_dir(&folder)).unwrap();
    let error = Store::with(config(&folder, Backend::Auto)).err().unwrap();
    assert!(matches!(error, MediaError::InUse { .. }), "{error}");
}

/// An operator may name anything: what is no device and no data directory is said to be none, and is not changed.
#[test]
fn strangers_are_named() {
    let folder = folder();
    let path = folder.path().join("stranger");
    assert!(OfflineDevice::open(&path).is_err());
    for (bytes, means) in [(vec![], "empty"), (vec![0; 9000], "empty"), (vec![b'x'; 3 << 20], "foreign")] {
        std::fs::write(&path, &bytes).unwrap();
        let device = OfflineDevice::open(&path).unwrap();
        let expected = if means == "empty" { CopyState::Empty } else { CopyState::Foreign };
        assert_eq!(device.copies()[0], expected);
        assert!(matches!(device.frame(0, 0), Err(MediaError::NotOurs { .. })));
        assert!(check(&[device], None, OPTIONS).is_err());
        assert!(std::fs::read(&path).unwrap() == bytes);
    }
    assert!(OfflineDevice::open(folder.path()).is_err(), "a folder is no device");
    let error = OfflineCatalog::open(folder.path()).err().unwrap();
    assert!(error.to_string().contains("no catalog"), "{error}");
    assert!(std::fs::read_dir(folder.path()).unwrap().count() == 1, "nothing was made");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Garbage anywhere on a device must neither stop inspection nor be taken for a block.
    #[test]
    fn garbage_is_survived(
        writes in proptest::collection::vec(
            (0u64..terrace_media::DATA_START + 2 * CHUNK_BYTES, proptest::collection::vec(any::<u8>(), 1..5000)), 1..40,
        ),
    ) {
        let (folder, _) = filled();
        let file = std::fs::File::options().write(true).open(device_path(&folder)).unwrap();
        for (at, bytes) in &writes {
            // Superblocks are hit in their second copy only, so that there is something to look at.
            let at = if *at < 512 << 10 { *at + (512 << 10) } else { *at };
            file.write_all_at(bytes, at).unwrap();
        }
        let device = OfflineDevice::open(&device_path(&folder)).unwrap();
        for index in 0..6 {
            let frame = device.frame(1, index).unwrap();
            if let (Some(Ok(found)), Some(true)) = (&frame.header, frame.payload) {
                let number = u8::try_from(index).unwrap();
                prop_assert_eq!(*found, header(number, &payload(number)));
            }
        }
        drop(device);
        let _ = checked(&folder);
    }
}

/// A write that is under way while we look must not be possible at all; this one comes afterwards and works.
#[test]
fn the_store_goes_on_after_inspection() {
    let (folder, _) = filled();
    checked(&folder);
    let mut store = Store::open(&folder, Backend::Auto);
    assert!(!store.report.scan_needed);
    assert_eq!(store.known().len(), 4);
    store.chunk(1, Access::Pool);
    let bytes = payload(6);
    store.fill(frame(1, 0), &bytes);
    assert_eq!(store.write(frame(1, 0), disk(1, 6), header(6, &bytes), Via::Direct), Ok(Done::Plain));
}
