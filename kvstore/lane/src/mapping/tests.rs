//! Mappings of real memfds: what a client may and may not do with them.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use super::*;

const PAGE: u64 = 4096;

fn memfd(name: &CStr, bytes: u64, seals: i32) -> File {
    // SAFETY: the name is a C string; the descriptor is new and ours.
    let file = unsafe {
        let raw = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(raw >= 0);
        File::from_raw_fd(raw)
    };
    file.set_len(bytes).unwrap();
    if seals != 0 {
        // SAFETY: no pointers are involved.
        assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }, 0);
    }
    file
}

fn chunk(access: Access) -> (File, File, Arc<Mapping>) {
    let data = memfd(c"data", 16 * PAGE, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW);
    let fences = memfd(c"fences", PAGE, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW);
    let mapping = Mapping::map(
        data.try_clone().unwrap().into(),
        ByteCount::new(16 * PAGE),
        fences.try_clone().unwrap().into(),
        ByteCount::new(PAGE),
        access,
    )
    .unwrap();
    (data, fences, mapping)
}

// What the daemon stores must be what a view shows, at the offset that was granted.
#[test]
fn a_view_shows_the_memory() {
    let (data, fences, mapping) = chunk(Access::Read);
    data.write_all_at(b"block", 3 * PAGE).unwrap();
    fences.write_all_at(&7u64.to_le_bytes(), 2 * 8).unwrap();
    let mut found = [0; 5];
    mapping.view(3 * PAGE, ByteCount::new(5)).unwrap().copy_to(&mut found);
    assert_eq!(&found, b"block");
    assert_eq!(mapping.fence(2), Some(Fence::new(7)));
    fences.write_all_at(&8u64.to_le_bytes(), 2 * 8).unwrap();
    assert_eq!(mapping.fence(2), Some(Fence::new(8)));
}

// A grant with a bad offset must be refused, not read past the mapping.
#[test]
fn nothing_outside_the_chunk_can_be_seen() {
    let (_data, _fences, mapping) = chunk(Access::Write);
    assert!(mapping.view(15 * PAGE, ByteCount::new(PAGE)).is_some());
    for (offset, length) in [(16 * PAGE, 1), (15 * PAGE + 1, PAGE), (u64::MAX, 2), (0, u64::MAX)] {
        assert!(mapping.view(offset, ByteCount::new(length)).is_none());
        assert!(mapping.view_mut(offset, ByteCount::new(length)).is_none());
    }
    assert_eq!(mapping.fence(u32::try_from(PAGE).unwrap() / 8), None);
}

// A window that was handed back must not be writable by us any more, whatever we try, and who reads in it goes on.
#[test]
fn write_permission_goes_for_good() {
    let (data, _fences, mapping) = chunk(Access::Write);
    let view = mapping.view_mut(PAGE, ByteCount::new(4)).unwrap();
    view.copy_from(0, b"abcd");
    let mut found = [0; 4];
    data.read_exact_at(&mut found, PAGE).unwrap();
    assert_eq!(&found, b"abcd");
    let busy = mapping.drop_write().unwrap_err();
    assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy, "a view still allows stores");
    drop(view);
    let reader = mapping.view(PAGE, ByteCount::new(4)).unwrap();
    mapping.drop_write().unwrap();
    reader.copy_to(&mut found);
    assert_eq!(&found, b"abcd");
    // SAFETY: only the protection of our own mapping would change.
    let raised = unsafe {
        libc::mprotect(
            mapping.data.start.as_ptr().cast(),
            mapping.data.length,
            libc::PROT_READ | libc::PROT_WRITE,
        )
    };
    assert_eq!(raised, -1, "the permission can be taken back");
    assert!(!mapping.is_writable());
    assert!(mapping.view_mut(PAGE, ByteCount::new(4)).is_none());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let start = format!("{:x}-", mapping.data.start.as_ptr() as usize);
    let line = maps.lines().find(|line| line.starts_with(&start)).unwrap();
    assert!(line.contains("r--s"), "{line}");
}

// Memory that is short or may shrink would kill us at a touch (SIGBUS).
#[test]
fn memory_that_could_vanish_is_refused() {
    let shrinkable = memfd(c"shrinkable", PAGE, 0);
    let sealed = memfd(c"sealed", PAGE, libc::F_SEAL_SHRINK);
    let map = |data: &File, bytes| {
        Mapping::map(
            data.try_clone().unwrap().into(),
            ByteCount::new(bytes),
            sealed.try_clone().unwrap().into(),
            ByteCount::new(PAGE),
            Access::Read,
        )
    };
    assert!(matches!(map(&shrinkable, PAGE), Err(MapError::NotSealed { what: "data" })));
    assert!(matches!(map(&sealed, 2 * PAGE), Err(MapError::TooSmall { what: "data", .. })));
    assert!(matches!(map(&sealed, 0), Err(MapError::BadLength { .. })));
    assert!(map(&sealed, PAGE).is_ok());
}

// A mapping that stays after its last view would keep memory from the daemon.
#[test]
fn the_last_view_unmaps() {
    let (_data, _fences, mapping) = chunk(Access::Read);
    let start = format!("{:x}-", mapping.data.start.as_ptr() as usize);
    let view = mapping.view(0, ByteCount::new(1)).unwrap();
    let mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().contains(&start);
    drop(mapping);
    assert!(mapped());
    drop(view);
    assert!(!mapped());
}

// A granule that is asked for twice would cost as much as a copy each time, and one that is taken for mapped after the
// range was mapped anew would fault page by page: each is new once, also at the end, until all are forgotten.
#[test]
fn a_granule_is_new_once() {
    let ahead = Ahead::of(64 * GRANULE_BYTES + 1, 4096);
    for granule in [0, 63, 64] {
        assert!(ahead.is_new(granule), "granule {granule}");
        assert!(!ahead.is_new(granule), "granule {granule}, again");
    }
    ahead.forget();
    assert!(ahead.is_new(64));
}
