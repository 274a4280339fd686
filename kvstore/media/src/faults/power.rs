//! A power cut for a whole file system.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// `_IOR('X', 125, u32)`: `EXT4_IOC_SHUTDOWN`, which XFS understands too.
const SHUTDOWN: libc::c_ulong = 0x8004_587d;
/// The journal is not flushed: what was not synced is gone, as if the power had failed.
const NO_LOG_FLUSH: u32 = 2;

/// Takes the power away from the ext4 or XFS file system that is mounted here: every later write and sync fails, and
/// the next mount finds what was synced. Unmount it afterwards. Never do this to a file system with anything of value.
///
/// # Errors
/// Another kind of file system, or no right to do so.
pub fn cut_power(mount: &Path) -> io::Result<()> {
    let folder = File::open(mount)?;
    // SAFETY: the descriptor is open, and the call reads one u32 that lives until it returns.
    let outcome = unsafe { libc::ioctl(folder.as_raw_fd(), SHUTDOWN, &NO_LOG_FLUSH) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
