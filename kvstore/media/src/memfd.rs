//! System calls under chunk memory: memfds and their seals, leases that tell
//! who else has one open, and mappings on the best pages that are to be had.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::facts;
use crate::memory::{HUGE_PAGE_BYTES, Holders, PageKind};

/// The machine keeps this much for everything else when a chunk is made.
const HEADROOM_BYTES: u64 = 256 << 20;
/// Stays in the second-level cache.
const FILL_BYTES: usize = 256 << 10;
/// As steps of addresses and ranges.
const HUGE_PAGE_STEP: usize = 2 << 20;
const _: () = assert!(HUGE_PAGE_STEP as u64 == HUGE_PAGE_BYTES);
/// A huge page that is at hand takes 0.2 ms. One that is not, because others' pages must be moved for it or because
/// a host has to find its memory first, took 6 ms, which is five times as long as small pages take.
const GATHER_TIME_MAX: Duration = Duration::from_micros(500);
/// What a first one may take longer.
const GATHER_TIME_MORE: Duration = Duration::from_millis(1);
/// Chunks that are not tried after one that found none at hand.
const GATHER_PAUSE: u32 = 7;

/// Chunks that are yet to be made without a try.
static UNTRIED: AtomicU32 = AtomicU32::new(0);
/// From `fcntl.h`: which signal says that a lease is broken.
const F_SETSIG: libc::c_int = 10;

/// A file lease is granted only if nobody else has the file open: `F_WRLCK` on
/// our read-only opening if there is no other opening at all, `F_RDLCK` if there
/// is none for writing. A mapping keeps its opening alive. Our own first opening
/// comes from `memfd_create`, which the kernel does not count.
pub(crate) fn holders(probe: Option<&OwnedFd>, blind: bool) -> Holders {
    let Some(probe) = probe else { return Holders::Unknown };
    if blind {
        return Holders::Unknown;
    }
    if lease(probe, libc::F_WRLCK) {
        Holders::Nobody
    } else if lease(probe, libc::F_RDLCK) {
        Holders::Readers
    } else {
        Holders::Writers
    }
}

/// A read-only opening of a fresh memfd for leases; `None` where /proc is not
/// there or the kernel grants no leases on memory.
pub(crate) fn probe(data: &OwnedFd) -> Option<OwnedFd> {
    let probe = reopen(data.as_fd(), libc::O_RDONLY).ok()?;
    // A lease that a foreign `open` breaks while we hold it raises a signal: one that is ignored by default.
    // SAFETY: plain fcntl on a descriptor that we own.
    unsafe { libc::fcntl(probe.as_raw_fd(), F_SETSIG, libc::SIGURG) };
    lease(&probe, libc::F_WRLCK).then_some(probe)
}

fn lease(probe: &OwnedFd, kind: libc::c_int) -> bool {
    // SAFETY: plain fcntl calls on a descriptor that we own.
    unsafe {
        let granted = libc::fcntl(probe.as_raw_fd(), libc::F_SETLEASE, kind) == 0;
        if granted {
            libc::fcntl(probe.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK);
        }
        granted
    }
}

/// What of a mapping is populated.
#[derive(Clone, Copy)]
enum Populate {
    /// Pages and their entries in the page table.
    New,
    /// The entries of pages that are there. Many are made at once.
    AsItIs,
}

/// A shared read-write mapping of a whole memfd.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) base: NonNull<u8>,
    pub(crate) bytes: u64,
    length: usize,
}

// SAFETY: a mapping is an address range; every access goes through raw pointers under the frame ownership rules of
// the core, or through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn new(fd: BorrowedFd<'_>, bytes: u64) -> io::Result<Self> {
        let length = usize::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let wish = huge_page_place(length);
        // SAFETY: a new mapping at an address of the kernel's choice: where something lies, it takes another.
        let address = unsafe { libc::mmap(wish, length, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base =
            NonNull::new(address.cast::<u8>()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        let mapping = Self { base, bytes, length };
        mapping.advise(libc::MADV_DONTFORK)?;
        // Prompts do not belong into core dumps; a kernel that cannot leave them out is no reason to stop.
        if let Err(error) = mapping.advise(libc::MADV_DONTDUMP) {
            tracing::debug!(%error, "chunk memory will be in core dumps");
        }
        Ok(mapping)
    }

    fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        self.advise_part(0, self.length, advice)
    }

    fn advise_part(&self, offset: usize, length: usize, advice: libc::c_int) -> io::Result<()> {
        assert!(offset <= self.length, "a part begins inside its whole");
        assert!(length <= self.length - offset, "a part ends inside its whole");
        // SAFETY: the range is a part of our own mapping.
        match unsafe { libc::madvise(self.base.as_ptr().add(offset).cast(), length, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// By a huge page at a time: the kernel lets nobody else of this process map anything meanwhile, nor grow a heap, and the
    /// whole took 155 ms where the host had to find the memory.
    fn populate(&self, how: Populate) -> io::Result<()> {
        let advice = match how {
            Populate::New => libc::MADV_POPULATE_WRITE,
            Populate::AsItIs => libc::MADV_POPULATE_READ,
        };
        let mut parts = (0..self.length).step_by(HUGE_PAGE_STEP);
        match parts.try_for_each(|at| self.advise_part(at, HUGE_PAGE_STEP.min(self.length - at), advice)) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                // A kernel before 5.14: touch each page. Running out of memory then is the kernel's business.
                for page in (0..self.length).step_by(4096) {
                    // SAFETY: inside our own fresh mapping, which nobody else knows yet.
                    unsafe { self.base.as_ptr().add(page).write_volatile(0) };
                }
                Ok(())
            }
            other => other,
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, unmapped once. Operations in flight hold the chunk, so none is under way.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// Populated memory of a chunk that nobody has had.
pub(crate) struct Blank {
    pub(crate) data: OwnedFd,
    pub(crate) mapping: Mapping,
    pub(crate) pages: PageKind,
}

impl Blank {
    /// On the best pages that are to be had. Blocks for 7 to 100 milliseconds.
    pub(crate) fn make(bytes: u64) -> io::Result<Self> {
        allocate(bytes).map(|(data, mapping, pages)| Self { data, mapping, pages })
    }
}

fn allocate(bytes: u64) -> io::Result<(OwnedFd, Mapping, PageKind)> {
    if facts::huge_pages_free() >= bytes / HUGE_PAGE_BYTES {
        match populated(bytes, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB, PageKind::Reserved) {
            Ok(made) => return Ok(made),
            Err(error) => tracing::info!(%error, "no reserved huge pages for a chunk; trying others"),
        }
    }
    if facts::memory_available().get() < bytes.saturating_add(HEADROOM_BYTES) {
        return Err(io::Error::new(
            io::ErrorKind::OutOfMemory,
            "not enough memory available for a chunk; lower `pinned_bytes` or stop other programs",
        ));
    }
    let kind = match facts::shmem_huge() {
        facts::ShmemHuge::Never => PageKind::Small,
        facts::ShmemHuge::Possible => PageKind::Transparent,
    };
    populated(bytes, 0, kind)
}

fn populated(bytes: u64, flags: libc::c_uint, pages: PageKind) -> io::Result<(OwnedFd, Mapping, PageKind)> {
    let fd = memfd("terrace-chunk", flags)?;
    truncate(fd.as_fd(), bytes)?;
    let mapping = Mapping::new(fd.as_fd(), bytes)?;
    if pages == PageKind::Transparent
        && let Err(error) = mapping.advise(libc::MADV_HUGEPAGE)
    {
        tracing::debug!(%error, "MADV_HUGEPAGE refused");
    }
    let mut found = pages;
    match pages {
        PageKind::Small => {
            let paused = |left: u32| left.checked_sub(1);
            let gathered = match UNTRIED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, paused) {
                Ok(_) => 0,
                Err(_) => gather(&fd, &mapping, bytes)?,
            };
            fill(&fd, gathered, bytes)?;
            mapping.populate(Populate::AsItIs)?;
            if gathered > 0 {
                found = PageKind::Transparent;
            }
        }
        PageKind::Reserved | PageKind::Transparent => mapping.populate(Populate::New)?,
    }
    Ok((fd, mapping, found))
}

/// Gives the beginning of a fresh memfd zeroed pages of 2 MiB, whatever `shmem_enabled` says of faults, and
/// answers how much: up to the end, or to where there is none at hand. 64 MiB took 7 ms so, and 45 with
/// small pages; their clients map them in 0.1 ms, which were 8; and they are gone in 0.3 ms, which were 18.
fn gather(fd: &OwnedFd, mapping: &Mapping, bytes: u64) -> io::Result<u64> {
    let file = File::from(fd.try_clone()?);
    let began = Instant::now();
    let mut time_max = GATHER_TIME_MORE;
    let mut done = 0;
    for offset in (0..usize::try_from(bytes).map_err(io::Error::other)?).step_by(HUGE_PAGE_STEP) {
        // Where there is no page yet, there is nothing to be gathered.
        file.write_all_at(&[0], done)?;
        // A kernel before 6.1 does not know it, and `deny` forbids it.
        if let Err(error) = mapping.advise_part(offset, HUGE_PAGE_STEP, libc::MADV_COLLAPSE) {
            tracing::debug!(%error, "no huge pages for the rest of a chunk");
            UNTRIED.store(GATHER_PAUSE, Ordering::Relaxed);
            break;
        }
        done += HUGE_PAGE_BYTES;
        time_max += GATHER_TIME_MAX;
        if began.elapsed() > time_max {
            UNTRIED.store(GATHER_PAUSE, Ordering::Relaxed);
            break;
        }
    }
    Ok(done)
}

/// An address where so many bytes would begin with a huge page, free just now; null, which is no wish, where the
/// kernel names none.
fn huge_page_place(length: usize) -> *mut libc::c_void {
    let Some(room) = length.checked_add(HUGE_PAGE_STEP) else { return std::ptr::null_mut() };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping of no memory at an address of the kernel's choice.
    let found = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
    if found == libc::MAP_FAILED {
        return std::ptr::null_mut();
    }
    // SAFETY: our own mapping of just now, which nobody knows.
    unsafe { libc::munmap(found, room) };
    found.map_addr(|address| address.next_multiple_of(HUGE_PAGE_STEP))
}

/// Makes the pages of a memfd by writing zeros: less than half of the time of a fault for each of them.
fn fill(fd: &OwnedFd, from: u64, bytes: u64) -> io::Result<()> {
    let zeros = vec![0; FILL_BYTES];
    let file = File::from(fd.try_clone()?);
    let mut done = from;
    while done < bytes {
        let piece = usize::try_from(bytes - done).map_or(FILL_BYTES, |rest| rest.min(FILL_BYTES));
        file.write_all_at(&zeros[..piece], done)?;
        done += piece as u64;
    }
    Ok(())
}

pub(crate) fn memfd(name: &str, flags: libc::c_uint) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
    // SAFETY: the name is a C string that outlives the call.
    let raw =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the kernel just gave us and nobody else knows.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    // It is born with 0777: whoever has a descriptor for reading could open it again for writing, through /proc.
    File::from(fd.try_clone()?).set_permissions(Permissions::from_mode(0o644))?;
    Ok(fd)
}

pub(crate) fn truncate(fd: BorrowedFd<'_>, bytes: u64) -> io::Result<()> {
    File::from(fd.try_clone_to_owned()?).set_len(bytes)
}

pub(crate) fn seal(fd: BorrowedFd<'_>, seals: libc::c_int) -> io::Result<()> {
    // SAFETY: plain fcntl on a descriptor that lives through the call.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A second, independent opening of the same file.
pub(crate) fn reopen(fd: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<OwnedFd> {
    let path =
        std::ffi::CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(io::Error::other)?;
    // SAFETY: the path is a C string that outlives the call.
    let raw = unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the kernel just gave us and nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of the mapping that are not in memory.
    fn absent(mapping: &Mapping) -> usize {
        let mut states = vec![0u8; mapping.length / 4096];
        // SAFETY: our own mapping, and a byte for each of its pages.
        let answer =
            unsafe { libc::mincore(mapping.base.as_ptr().cast(), mapping.length, states.as_mut_ptr()) };
        assert_eq!(answer, 0, "{}", io::Error::last_os_error());
        states.iter().filter(|state| **state & 1 == 0).count()
    }

    // A page between those that were gathered and those that were filled would be missing: its first use, by a client,
    // may find no memory. All are there, whether the kernel gathers or not.
    #[test]
    fn gathered_and_filled_pages_are_the_whole() {
        let bytes = 3 * HUGE_PAGE_BYTES;
        let fd = memfd("test", 0).unwrap();
        truncate(fd.as_fd(), bytes).unwrap();
        let mapping = Mapping::new(fd.as_fd(), bytes).unwrap();
        assert_eq!(mapping.base.as_ptr() as usize % HUGE_PAGE_STEP, 0, "no huge page begins here");
        assert_eq!(absent(&mapping), mapping.length / 4096);
        let gathered = gather(&fd, &mapping, HUGE_PAGE_BYTES).unwrap();
        assert!(gathered == 0 || gathered == HUGE_PAGE_BYTES, "{gathered} bytes gathered of one page");
        fill(&fd, gathered, bytes).unwrap();
        assert_eq!(absent(&mapping), 0);
        let (_fd, whole, _) = populated(bytes, 0, PageKind::Small).unwrap();
        assert_eq!(absent(&whole), 0);
    }
}
