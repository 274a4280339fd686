//! The file or raw device under a [`super::Device`]: opened with O_DIRECT,
//! locked against a second daemon, preallocated.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::api::MediaError;
use crate::facts::room;

/// Unit of `st_blocks`, whatever the file system.
const STAT_BLOCK_BYTES: u64 = 512;

/// How long the locks of a process that is gone may take to go as well.
const DEAD_OWNER_PATIENCE: Duration = Duration::from_secs(10);

/// A scratch area may take this part of the room that is left.
const SCRATCH_ROOM_PARTS: u64 = 64;

/// An open, locked, preallocated device.
#[derive(Debug)]
pub(crate) struct DeviceFile {
    file: File,
    path: PathBuf,
    direct: bool,
    /// It did not exist, or was empty.
    pub(crate) fresh: bool,
    /// Bytes that were missing at its end, if it had been made before.
    pub(crate) missing_bytes: u64,
}

impl DeviceFile {
    pub(crate) fn open(path: &Path, bytes: u64) -> Result<Self, MediaError> {
        let failed = |action: &'static str| {
            move |source: io::Error| MediaError::File { path: path.to_owned(), action, source }
        };
        let (file, direct) = open_direct(path).map_err(failed("open or create it"))?;
        lock_exclusively(&file, path)?;
        let facts = file.metadata().map_err(failed("look at it"))?;
        if facts.file_type().is_block_device() {
            let found = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(failed("measure it"))?;
            if found == 0 {
                // So says one that is dead, or a drive without a medium.
                return Err(failed("use it")(io::Error::from_raw_os_error(libc::ENOMEDIUM)));
            }
            if found < bytes {
                let text = format!("the device has {found} bytes, configured are {bytes}; lower its `bytes`");
                return Err(failed("use it")(io::Error::new(io::ErrorKind::InvalidInput, text)));
            }
            return Ok(Self { file, path: path.to_owned(), direct, fresh: false, missing_bytes: 0 });
        }
        if !facts.is_file() {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device");
            return Err(failed("use it")(error));
        }
        let fresh = facts.len() == 0;
        let missing_bytes = if fresh { 0 } else { bytes.saturating_sub(facts.len()) };
        Ok(Self { file, path: path.to_owned(), direct, fresh, missing_bytes })
    }

    /// Opens what is there for reading only, locked against a daemon.
    pub(crate) fn open_read_only(path: &Path) -> Result<Self, MediaError> {
        let failed = |action| move |source| MediaError::File { path: path.to_owned(), action, source };
        let mut options = OpenOptions::new();
        options.read(true);
        let (file, direct) = match options.clone().custom_flags(libc::O_DIRECT).open(path) {
            Ok(file) => (file, true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (options.open(path).map_err(failed("open it"))?, false)
            }
            Err(error) => return Err(failed("open it")(error)),
        };
        let facts = file.metadata().map_err(failed("look at it"))?;
        if !facts.is_file() && !facts.file_type().is_block_device() {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device");
            return Err(failed("look at it")(error));
        }
        lock_exclusively(&file, path)?;
        Ok(Self { file, path: path.to_owned(), direct, fresh: false, missing_bytes: 0 })
    }

    /// Whatever lies at this path, without checks.
    #[cfg(test)]
    pub(super) fn unchecked(path: &Path) -> io::Result<Self> {
        let (file, direct) = open_direct(path)?;
        Ok(Self { file, path: path.to_owned(), direct, fresh: false, missing_bytes: 0 })
    }

    /// Reserves the room on the file system, so that a later write cannot run out of it.
    pub(crate) fn preallocate(&self, bytes: u64) -> Result<(), MediaError> {
        let facts = self.file.metadata();
        if facts.is_ok_and(|facts| facts.file_type().is_block_device()) {
            return Ok(());
        }
        let length =
            i64::try_from(bytes).map_err(|_| MediaError::BadConfig("a device is larger than 2^63 bytes"))?;
        let action = "reserve its room (lower its `bytes`, or free space)";
        let failed = |source| MediaError::File { path: self.path.clone(), action, source };
        // Asked first, because a request that cannot be met takes all the room there
        // is before it fails, and with it the room of everybody else's next write.
        if self.missing_room(bytes).map_err(failed)? {
            return Err(failed(io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        // SAFETY: plain system call on a descriptor that we own.
        if unsafe { libc::fallocate64(self.file.as_raw_fd(), 0, 0, length) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        let outcome = match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => self.file.set_len(bytes.max(self.len())),
            _ => Err(error),
        };
        outcome.map_err(failed)
    }

    /// Where `bytes` behind everything can be read and written for a while: a file
    /// is made longer until [`Self::end_scratch`], a raw device has the room or not.
    pub(crate) fn scratch(&self, end: u64, bytes: u64) -> Option<u64> {
        let facts = self.file.metadata().ok()?;
        if facts.file_type().is_block_device() {
            let found = io::Seek::seek(&mut &self.file, io::SeekFrom::End(0)).ok()?;
            return (end.checked_add(bytes)? <= found).then_some(end);
        }
        // Behind what an earlier configuration may have put there.
        let start = end.max(facts.len()).checked_next_multiple_of(crate::memory::PAGE_BYTES)?;
        if room(&self.path).ok()? < bytes.saturating_mul(SCRATCH_ROOM_PARTS) {
            return None;
        }
        let (offset, length) = (i64::try_from(start).ok()?, i64::try_from(bytes).ok()?);
        // SAFETY: plain system call on a descriptor that we own.
        let made = unsafe { libc::fallocate64(self.file.as_raw_fd(), 0, offset, length) } == 0;
        made.then_some(start)
    }

    /// Gives the room of a scratch area back.
    pub(crate) fn end_scratch(&self, start: u64) {
        let is_file = self.file.metadata().is_ok_and(|facts| facts.is_file());
        if is_file && let Err(error) = self.file.set_len(start) {
            tracing::debug!(%error, "the scratch area of the self-test stays");
        }
    }

    /// Whether the file system has less room than the file still needs.
    fn missing_room(&self, bytes: u64) -> io::Result<bool> {
        let taken = self.file.metadata()?.blocks().saturating_mul(STAT_BLOCK_BYTES);
        Ok(bytes.saturating_sub(taken) > room(&self.path)?)
    }

    fn len(&self) -> u64 {
        self.file.metadata().map_or(0, |facts| facts.len())
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn is_direct(&self) -> bool {
        self.direct
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for DeviceFile {
    fn drop(&mut self) {
        // A ring lets go of its files some time after it is closed; the lock must not live that long.
        if let Err(error) = self.file.unlock() {
            tracing::warn!(path = %self.path.display(), %error, "the device stays locked until the kernel closes it");
        }
    }
}

impl AsRawFd for DeviceFile {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn open_direct(path: &Path) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    match options.clone().custom_flags(libc::O_DIRECT).open(path) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok((options.open(path)?, false)),
        Err(error) => Err(error),
    }
}

/// Takes the lock that keeps a second daemon away, or says who has it.
///
/// The kernel closes a killed process's ring some time after the process is
/// gone, and until then its writes may still be under way and its locks are
/// held: a lock of a dead process is waited for.
pub(crate) fn lock_exclusively(file: &File, path: &Path) -> Result<(), MediaError> {
    let patience_ends = Instant::now() + DEAD_OWNER_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(std::fs::TryLockError::WouldBlock) => {}
            Err(std::fs::TryLockError::Error(source)) => {
                return Err(MediaError::File { path: path.to_owned(), action: "lock it", source });
            }
        }
        let owner = lock_owner(file);
        let alive = owner.as_deref().is_some_and(is_alive);
        if alive || Instant::now() >= patience_ends {
            let pid = owner.unwrap_or_else(|| "unknown".to_owned());
            return Err(MediaError::InUse { path: path.to_owned(), pid });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Is there a process of this number that is more than a zombie?
fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // `1234 (name, with anything in it) S 1 ...`
    let state = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next());
    state.is_some_and(|state| state != "Z" && state != "X")
}

/// The process that /proc/locks names for this file. It names inodes, and devices in a way of its own, so files of
/// two file systems may look alike: a process counts if it has this one open, or if that cannot be told.
fn lock_owner(file: &File) -> Option<String> {
    let facts = file.metadata().ok()?;
    let inode = facts.ino().to_string();
    let has_open = |pid: &str| {
        let Ok(open) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return true };
        let is_it = |found: std::fs::Metadata| (found.dev(), found.ino()) == (facts.dev(), facts.ino());
        open.flatten().any(|entry| std::fs::metadata(entry.path()).is_ok_and(is_it))
    };
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    locks.lines().find_map(|line| {
        // `1: FLOCK  ADVISORY  WRITE 1234 fe:00:131 0 EOF`
        let mut words = line.split_whitespace().skip(1);
        let kind = words.next()?;
        let pid = words.nth(2)?;
        let found = words.next()?.rsplit(':').next()?;
        (kind == "FLOCK" && found == inode && has_open(pid)).then(|| pid.to_owned())
    })
}
