//! Devices that cannot be opened, or written, at a start: a dead one keeps no other from serving, a wrong path is refused,
//! and nothing is made where a device should be.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::*;
use tempfile::TempDir;
use terrace_core::{BlockHeader, ByteCount, DeviceId, DiskFrame, Done, Fault};
use terrace_media::{
    Access, Backend, DeviceConfig, FaultyDevice, Injected, IoOp, MediaConfig, MediaError, MediaOp,
};

/// The second device, on a file system of its own.
fn second(folder: &TempDir) -> PathBuf {
    folder.path().join("mount/nvme1.dat")
}

/// A store with a second device.
fn two(folder: &TempDir, path: &Path) -> MediaConfig {
    let mut config = config(folder, Backend::Auto);
    config.devices.push(DeviceConfig { path: path.to_owned(), slots: 4 });
    config
}

fn refused(config: MediaConfig) -> String {
    let error = Store::with(config).err().expect("it starts");
    assert!(matches!(error, MediaError::NewAndShut { .. }), "{error:?}");
    error.to_string()
}

/// Which devices are used.
fn usable(store: &Store) -> Vec<bool> {
    store.media.facts().devices.iter().map(|device| device.usable).collect()
}

/// A block on each of two devices, that on the second with its place. The node has stopped.
fn one_on_each(config: MediaConfig) -> (BlockHeader, (DiskFrame, BlockHeader)) {
    let mut store = Store::with(config).unwrap();
    store.chunk(1, Access::Pool);
    store.carve(0);
    let on_first = store.persist(1, disk(0, 0));
    let device = DeviceId::new(1);
    let (space, frame_bytes) = (space(), ByteCount::new(FRAME_BYTES));
    let carved = store.run(|op| MediaOp::CarveSlot { op, device, slot: 0, space, frame_bytes });
    assert_eq!(carved, Ok(Done::Plain));
    let place = DiskFrame { device, ..disk(0, 0) };
    (on_first, (place, store.persist(2, place)))
}

/// Ways in which a path leads to no device.
#[derive(Clone, Copy, Debug)]
enum Way {
    NoFolder,
    /// Nothing is mounted.
    EmptyFolder,
    Socket,
    Folder,
    /// To a raw device that is gone.
    Link,
}

impl Way {
    fn take(self, path: &Path) -> Option<UnixListener> {
        // It may be there from the way before.
        let _ = std::fs::remove_dir_all(path.parent().unwrap());
        if matches!(self, Self::NoFolder) {
            return None;
        }
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        match self {
            Self::NoFolder | Self::EmptyFolder => {}
            Self::Socket => return Some(UnixListener::bind(path).unwrap()),
            Self::Folder => std::fs::create_dir(path).unwrap(),
            Self::Link => std::os::unix::fs::symlink("/dev/terrace-none", path).unwrap(),
        }
        None
    }
}

/// A device of a node is not there at a start, in every way that a path can fail. The node could stay down with all its
/// other devices; it could make a file in its place, on whatever file system there is, and forget its blocks. It must
/// serve without it, leave its place alone, and have its blocks again when it is back.
#[test]
fn a_device_that_does_not_open_is_waited_for() {
    let folder = folder();
    let (path, mount, away) = (second(&folder), folder.path().join("mount"), folder.path().join("away"));
    std::fs::create_dir(&mount).unwrap();
    let (on_first, (place, on_second)) = one_on_each(two(&folder, &path));
    std::fs::rename(&mount, &away).unwrap();
    let kind = || path.symlink_metadata().map(|facts| facts.file_type()).ok();
    // A lost catalog does not say that there was a second one; the first one says that the node has run.
    let lost = [false, false, false, false, false, true, false];
    let ways = [
        Way::NoFolder,
        Way::EmptyFolder,
        Way::Socket,
        Way::Folder,
        Way::Link,
        Way::NoFolder,
        Way::EmptyFolder,
    ];
    for (way, lost_catalog) in ways.into_iter().zip(lost) {
        let _socket = way.take(&path);
        if lost_catalog {
            std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
        }
        let before = kind();
        let mut store = Store::with(two(&folder, &path)).unwrap_or_else(|error| panic!("{way:?}: {error}"));
        assert_eq!(usable(&store), [true, false], "{way:?}");
        let condition = &store.media.facts().devices[1].condition;
        assert!(condition.contains("nvme1.dat"), "{way:?}: {condition}");
        assert!(store.report.notes.iter().any(|note| note.contains("without a device")), "{way:?}");
        store.media.scan(&mut |_| {}).unwrap();
        store.chunk(1, Access::Pool);
        assert_eq!(store.read(disk(0, 0), frame(1, 1), on_first), Ok(Done::Plain), "{way:?}");
        assert_eq!(store.known(), [on_first.block], "{way:?}: what it holds is not served");
        assert_eq!(kind(), before, "{way:?}: something was made in its place");
    }
    std::fs::remove_dir_all(&mount).unwrap();
    std::fs::rename(&away, &mount).unwrap();
    let mut store = Store::with(two(&folder, &path)).unwrap();
    assert_eq!(usable(&store), [true, true]);
    store.media.scan(&mut |_| {}).unwrap();
    store.chunk(1, Access::Pool);
    assert_eq!(store.read(place, frame(1, 3), on_second), Ok(Done::Plain));
    assert_eq!(store.payload(frame(1, 3)), payload(2));
    assert_eq!(store.known(), [on_first.block, on_second.block]);
}

/// A path that leads nowhere is a slip of whoever wrote it, where the node never had a device: at the first start, for a
/// device that is added, for the only one under another path. It must be said, and nothing be made.
#[test]
fn a_path_that_never_led_anywhere_is_refused() {
    let folder = folder();
    let nowhere = folder.path().join("nowhere/nvme1.dat");
    for path in [nowhere.as_path(), Path::new("/dev/terrace-none")] {
        let said = refused(two(&folder, path));
        assert!(said.contains(path.to_str().unwrap()) && said.contains("correct the path"), "{said}");
        assert!(!path.exists() && !folder.path().join("data/catalog").exists(), "something was made");
    }
    drop(Store::open(&folder, Backend::Auto));
    refused(two(&folder, &nowhere));
    let mut moved = config(&folder, Backend::Auto);
    moved.devices[0].path = nowhere;
    refused(moved);
    drop(Store::open(&folder, Backend::Auto));
}

/// The only device is not there, under the path that it had: the node serves from memory, as it does when it was
/// overwritten. An empty file in its place is a new device.
#[test]
fn an_only_device_that_is_gone_leaves_the_memory() {
    let folder = folder();
    drop(Store::open(&folder, Backend::Auto));
    std::fs::remove_file(device_path(&folder)).unwrap();
    for life in 2..4 {
        let store = Store::open(&folder, Backend::Auto);
        assert_eq!((usable(&store), store.report.incarnation), (vec![false], life));
        assert!(!device_path(&folder).exists());
    }
    std::fs::File::create(device_path(&folder)).unwrap();
    let store = Store::open(&folder, Backend::Auto);
    assert_eq!((usable(&store), store.report.incarnation), (vec![true], 4));
    assert!(store.report.notes.iter().any(|note| note.contains("replaced")));
    // Without a catalog nothing says that it was there.
    drop(store);
    std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
    std::fs::remove_file(device_path(&folder)).unwrap();
    drop(Store::open(&folder, Backend::Auto));
}

/// A device that was taken away is not waited for any more.
#[test]
fn a_device_that_is_not_configured_is_forgotten() {
    let folder = folder();
    let path = folder.path().join("nvme1.dat");
    drop(Store::with(two(&folder, &path)).unwrap());
    drop(Store::open(&folder, Backend::Auto));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(usable(&Store::with(two(&folder, &path)).unwrap()), [true, true]);
}

/// A device can be read and takes no writes any more, as drives do at the end of their lives, or does not answer them. The
/// node could stay down for it; it must serve the other one, say so, and have the blocks when the device takes writes again.
#[test]
fn a_device_that_takes_no_superblock_is_out() {
    let folder = folder();
    let path = folder.path().join("nvme1.dat");
    let (on_first, (place, on_second)) = one_on_each(two(&folder, &path));
    for fault in [Injected::Fail(Fault::Device), Injected::Hang] {
        let found = Arc::new(Mutex::new(None));
        let keep = Arc::clone(&found);
        let mut config = two(&folder, &path);
        config.hooks.io_patience = Some(Duration::from_millis(200));
        config.hooks.wrap_device = Some(Box::new(move |device, inner| {
            if device == DeviceId::new(0) {
                return inner;
            }
            let wrapped = Arc::new(FaultyDevice::new(inner));
            wrapped.inject(IoOp::Write, fault);
            *keep.lock().unwrap() = Some(Arc::clone(&wrapped));
            wrapped
        }));
        let mut store = Store::with(config).unwrap();
        assert_eq!(usable(&store), [true, false], "{fault:?}");
        assert!(store.report.carves.iter().all(|carve| carve.device == DeviceId::new(0)), "{fault:?}");
        store.chunk(1, Access::Pool);
        assert_eq!(store.known(), [on_first.block], "{fault:?}");
        assert_eq!(store.read(disk(0, 0), frame(1, 1), on_first), Ok(Done::Plain), "{fault:?}");
        // What it still has keeps it open, and here the process goes on.
        found.lock().unwrap().take().unwrap().release();
    }
    let until = Instant::now() + PATIENCE;
    let mut store = loop {
        match Store::with(two(&folder, &path)) {
            Err(MediaError::InUse { .. }) if Instant::now() < until => std::thread::yield_now(),
            opened => break opened.unwrap(),
        }
    };
    assert_eq!(usable(&store), [true, true]);
    store.chunk(1, Access::Pool);
    assert_eq!(store.read(place, frame(1, 3), on_second), Ok(Done::Plain));
}
