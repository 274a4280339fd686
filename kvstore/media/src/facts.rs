//! What the machine offers for chunks, read from /proc and /sys, and what an
//! operator can do about it. Stale at once; nothing here decides.

use std::ffi::CString;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use terrace_core::ByteCount;

/// Can shared memory have transparent huge pages?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShmemHuge {
    /// `shmem_enabled` is `never` or `deny`, or cannot be read.
    Never,
    /// With MADV_HUGEPAGE at least.
    Possible,
}

/// Memory facts for `info` and `doctor`.
#[derive(Clone, Debug)]
pub struct MemoryFacts {
    /// Memory that a chunk may still take, as the kernel and the control group see it.
    pub available: ByteCount,
    /// Reserved 2 MiB pages that nobody uses.
    pub huge_pages_free: u64,
    /// The chosen word of `shmem_enabled`.
    pub shmem_enabled: String,
    /// Soft limit of locked memory; `None` is unlimited, as with CAP_IPC_LOCK.
    pub memlock: Option<ByteCount>,
    /// What is not as good as it could be, and how to mend it.
    pub notes: Vec<String>,
}

/// Bytes that an ordinary user may still take on the file system of `path`.
///
/// # Errors
/// What the kernel says.
pub(crate) fn room(path: &Path) -> io::Result<u64> {
    let text = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let mut facts = MaybeUninit::<libc::statvfs64>::uninit();
    // SAFETY: `text` ends with a zero; the kernel writes one such struct, for which there is room.
    if unsafe { libc::statvfs64(text.as_ptr(), facts.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the struct is written.
    let facts = unsafe { facts.assume_init() };
    Ok(facts.f_bavail.saturating_mul(facts.f_frsize))
}

/// Reads the facts.
pub fn memory_facts() -> MemoryFacts {
    let shmem_enabled = chosen_word(&read("/sys/kernel/mm/transparent_hugepage/shmem_enabled"));
    let huge_pages_free = huge_pages_free();
    let memlock = memlock();
    let mut notes = Vec::new();
    if huge_pages_free == 0 && shmem_huge() == ShmemHuge::Never {
        notes.push(
            "chunks get 2 MiB pages only where such are at hand, and 4 KiB pages halve disk speed: run `echo advise > \
             /sys/kernel/mm/transparent_hugepage/shmem_enabled`, or reserve pages with `vm.nr_hugepages`"
                .to_owned(),
        );
    }
    if let Some(limit) = memlock {
        notes.push(format!(
            "locked memory is limited to {} bytes and CAP_IPC_LOCK is missing: chunks are not registered with io_uring \
             (more CPU per byte); raise it with `LimitMEMLOCK=infinity` or `ulimit -l unlimited`",
            limit.get()
        ));
    }
    MemoryFacts { available: memory_available(), huge_pages_free, shmem_enabled, memlock, notes }
}

/// Memory that could still be taken: the kernel's MemAvailable, or what the
/// control group leaves if that is less. Zero if /proc cannot be read.
pub fn memory_available() -> ByteCount {
    let machine = meminfo("MemAvailable:").unwrap_or(0).saturating_mul(1024);
    ByteCount::new(control_group_free().map_or(machine, |free| free.min(machine)))
}

/// Free reserved pages of 2 MiB that are not promised to another mapping.
pub(crate) fn huge_pages_free() -> u64 {
    if meminfo("Hugepagesize:") != Some(2048) {
        return 0;
    }
    let free = meminfo("HugePages_Free:").unwrap_or(0);
    free.saturating_sub(meminfo("HugePages_Rsvd:").unwrap_or(0))
}

pub(crate) fn shmem_huge() -> ShmemHuge {
    match chosen_word(&read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")).as_str() {
        "always" | "within_size" | "advise" | "force" => ShmemHuge::Possible,
        _ => ShmemHuge::Never,
    }
}

/// Whether the limit of locked memory does not apply to this process.
fn may_lock_memory() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let status = read("/proc/self/status");
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = mask.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    mask.is_some_and(|mask| mask & (1 << CAP_IPC_LOCK) != 0)
}

fn memlock() -> Option<ByteCount> {
    if may_lock_memory() {
        return None;
    }
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit that the call fills.
    let answer = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    (answer == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then(|| ByteCount::new(limit.rlim_cur))
}

/// What is left in our control group (version 2), or in the tightest one above it.
fn control_group_free() -> Option<u64> {
    let groups = read("/proc/self/cgroup");
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?.trim();
    let mut folder = std::path::PathBuf::from("/sys/fs/cgroup").join(path.trim_start_matches('/'));
    let mut least: Option<u64> = None;
    while folder.starts_with("/sys/fs/cgroup") {
        let number = |name: &str| read_path(&folder.join(name)).trim().parse::<u64>().ok();
        if let (Some(limit), Some(current)) = (number("memory.max"), number("memory.current")) {
            let free = limit.saturating_sub(current);
            least = Some(least.map_or(free, |other| other.min(free)));
        }
        if !folder.pop() {
            break;
        }
    }
    least
}

fn meminfo(name: &str) -> Option<u64> {
    let text = read("/proc/meminfo");
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

/// `always [never] deny` means `never`.
fn chosen_word(text: &str) -> String {
    let inside = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or_else(String::new, |(word, _)| word.to_owned())
}

fn read(path: &str) -> String {
    read_path(Path::new(path))
}

fn read_path(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's way of marking the current choice must not be misread as the list's first word.
    #[test]
    fn chosen_word_is_the_one_in_brackets() {
        assert_eq!(chosen_word("always within_size [advise] never\n"), "advise");
        assert_eq!(chosen_word("no brackets"), "");
        assert_eq!(chosen_word("broken [word"), "");
    }

    /// A misspelt field would read as zero and every chunk would be refused.
    #[test]
    fn memory_is_available_on_this_machine() {
        assert!(memory_available().get() > 0);
    }
}
