//! The system calls that std and tokio do not wrap: messages with descriptors,
//! sockets that are private before anybody can connect, process descriptors.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Most descriptors in one message: data and fences of two chunks.
pub(crate) const DESCRIPTORS_PER_MESSAGE_MAX: usize = 4;

// Linux accepts up to 253 descriptors in one message; more than ours are closed by the kernel (MSG_CTRUNC).
// CMSG_SPACE of four descriptors is 32 bytes; twice that, aligned like a cmsghdr.
const CONTROL_BYTES: usize = 64;

#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// What one `recvmsg` brought.
pub(crate) struct Arrived {
    /// Bytes stored; 0 means that the peer closed.
    pub(crate) bytes: usize,
    /// Descriptors, close-on-exec, in the order they were sent.
    pub(crate) descriptors: Vec<OwnedFd>,
    /// The peer sent more descriptors than we take; the kernel closed the rest.
    pub(crate) cut: bool,
}

/// An aligned address where so many bytes would fit just now; null, which is no wish, where the kernel names none.
pub(crate) fn place_of(length: usize, align: usize) -> *mut libc::c_void {
    let Some(room) = length.checked_add(align) else { return std::ptr::null_mut() };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping of no memory at an address of the kernel's choice.
    let found = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
    if found == libc::MAP_FAILED {
        return std::ptr::null_mut();
    }
    // SAFETY: our own mapping of just now, which nobody knows.
    unsafe { libc::munmap(found, room) };
    found.map_addr(|address| address.next_multiple_of(align))
}

/// Receives into `target`; never blocks.
pub(crate) fn receive(socket: BorrowedFd<'_>, target: &mut [u8]) -> io::Result<Arrived> {
    let mut control = Control([0; CONTROL_BYTES]);
    let mut part = libc::iovec { iov_base: target.as_mut_ptr().cast(), iov_len: target.len() };
    // SAFETY: msghdr is a plain C struct for which all zeros is a valid value.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_BYTES;
    // SAFETY: the header points at one iovec over `target` and at the control
    // buffer, both alive and exclusively ours for the whole call.
    let received = unsafe {
        libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT)
    };
    let bytes = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let descriptors = take_descriptors(&header);
    Ok(Arrived { bytes, descriptors, cut: header.msg_flags & libc::MSG_CTRUNC != 0 })
}

/// Takes ownership of every descriptor in the control messages of `header`.
fn take_descriptors(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut taken = Vec::new();
    // SAFETY: the kernel filled the control buffer that `header` describes; the
    // CMSG macros stay within msg_controllen.
    let mut entry = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !entry.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or an entry inside the buffer.
        let (level, kind, length) = unsafe { ((*entry).cmsg_level, (*entry).cmsg_type, (*entry).cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: CMSG_LEN(0) only computes.
            let payload = length.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
            for index in 0..payload / size_of::<RawFd>() {
                // SAFETY: the entry's payload holds `payload` bytes of descriptors;
                // the kernel has just installed each of them for us alone.
                let descriptor = unsafe {
                    let raw = libc::CMSG_DATA(entry).cast::<RawFd>().add(index).read_unaligned();
                    OwnedFd::from_raw_fd(raw)
                };
                taken.push(descriptor);
            }
        }
        // SAFETY: `entry` came from this header's buffer.
        entry = unsafe { libc::CMSG_NXTHDR(header, entry) };
    }
    taken
}

/// Sends `source`, with `descriptors` beside its first byte; never blocks.
pub(crate) fn send(socket: BorrowedFd<'_>, source: &[u8], descriptors: &[OwnedFd]) -> io::Result<usize> {
    assert!(descriptors.len() <= DESCRIPTORS_PER_MESSAGE_MAX, "more descriptors than a message may carry");
    let mut control = Control([0; CONTROL_BYTES]);
    let mut part = libc::iovec { iov_base: source.as_ptr().cast_mut().cast(), iov_len: source.len() };
    // SAFETY: msghdr is a plain C struct for which all zeros is a valid value.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if !descriptors.is_empty() {
        let bytes = u32::try_from(size_of::<RawFd>() * descriptors.len()).expect("at most 16 bytes");
        header.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE only computes; 4 descriptors need 32 of the buffer's 64 bytes.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(bytes) } as usize;
        // SAFETY: the control buffer is aligned, zeroed and large enough for one
        // entry with these descriptors, as computed by CMSG_SPACE above.
        unsafe {
            let entry = libc::CMSG_FIRSTHDR(&raw const header);
            (*entry).cmsg_level = libc::SOL_SOCKET;
            (*entry).cmsg_type = libc::SCM_RIGHTS;
            (*entry).cmsg_len = libc::CMSG_LEN(bytes) as usize;
            for (index, descriptor) in descriptors.iter().enumerate() {
                libc::CMSG_DATA(entry).cast::<RawFd>().add(index).write_unaligned(descriptor.as_raw_fd());
            }
        }
    }
    // SAFETY: header, iovec, control buffer and source live through the call;
    // the kernel only reads them.
    let sent = unsafe {
        libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// A listening, non-blocking socket at `path` with this mode from the start.
/// The path must be shorter than `sun_path`.
pub(crate) fn listen(path: &Path, mode: u32, backlog: i32) -> io::Result<OwnedFd> {
    let name = path.as_os_str().as_bytes();
    // SAFETY: sockaddr_un is a plain C struct for which all zeros is a valid value.
    let mut address: libc::sockaddr_un = unsafe { MaybeUninit::zeroed().assume_init() };
    if name.len() >= address.sun_path.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidFilename));
    }
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).expect("AF_UNIX is 1");
    for (target, byte) in address.sun_path.iter_mut().zip(name) {
        *target = byte.cast_signed();
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers are involved.
    let raw = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `raw` was opened by the call above and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    let length = u32::try_from(size_of::<libc::sockaddr_un>()).expect("sockaddr_un is 110 bytes");
    // Private before bind creates the file, and opened further, past the umask, before anybody can connect.
    // SAFETY: `socket` is open; `address` is a valid sockaddr_un of `length` bytes.
    let bound =
        unsafe { libc::fchmod(raw, 0o600) == 0 && libc::bind(raw, (&raw const address).cast(), length) == 0 };
    if !bound {
        return Err(io::Error::last_os_error());
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    // SAFETY: no pointers are involved.
    match unsafe { libc::listen(raw, backlog) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A descriptor of the process at the other end, which becomes readable when
/// that process ends. `None` where the kernel does not offer it (before 6.5).
pub(crate) fn peer_pidfd(socket: BorrowedFd<'_>) -> Option<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut raw: RawFd = -1;
    let mut length = u32::try_from(size_of::<RawFd>()).expect("a descriptor is 4 bytes");
    // SAFETY: the kernel writes at most `length` bytes, the size of `raw`.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut raw).cast(),
            &raw mut length,
        )
    };
    if answer != 0 || raw < 0 {
        return None;
    }
    // SAFETY: the kernel has just installed this descriptor for us (close-on-exec).
    Some(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Ends a connection. An error means that it had ended already.
pub(crate) fn shut_down(socket: BorrowedFd<'_>) {
    // SAFETY: no pointers are involved.
    let _ended_before = unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

/// Length of the file behind a descriptor and whether it is sealed against shrinking.
pub(crate) fn memory_facts(memory: BorrowedFd<'_>) -> io::Result<(u64, bool)> {
    let facts = stat(memory)?;
    // SAFETY: no pointers are involved.
    let seals = unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_GET_SEALS) };
    let sealed = seals >= 0 && seals & libc::F_SEAL_SHRINK != 0;
    Ok((u64::try_from(facts.st_size).unwrap_or(0), sealed))
}

/// The pages that memory is made of, as far as the kernel says: reserved huge pages say so.
pub(crate) fn page_bytes(memory: BorrowedFd<'_>) -> usize {
    stat(memory).map_or(0, |facts| usize::try_from(facts.st_blksize).unwrap_or(0))
}

fn stat(memory: BorrowedFd<'_>) -> io::Result<libc::stat> {
    // SAFETY: stat is a plain C struct for which all zeros is a valid value.
    let mut facts: libc::stat = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: the kernel writes one stat, which `facts` has room for.
    if unsafe { libc::fstat(memory.as_raw_fd(), &raw mut facts) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(facts)
}

/// A second, independent opening of the same memory that cannot write.
pub(crate) fn reopen_read_only(memory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    std::fs::File::open(path).map(OwnedFd::from)
}

/// User id that this process acts as.
pub(crate) fn own_uid() -> u32 {
    // SAFETY: no pointers are involved, and it cannot fail.
    unsafe { libc::geteuid() }
}

/// As [`peer_pidfd`] for kernels without it, by the number of the process. That number may be another process's by
/// now: whoever watches the descriptor watches the socket as well.
pub(crate) fn pidfd_of(pid: u32) -> Option<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).ok().filter(|pid| *pid > 0)?;
    // SAFETY: no pointers are involved.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let raw = RawFd::try_from(raw).ok().filter(|raw| *raw >= 0)?;
    // SAFETY: the kernel has just installed this descriptor for us (close-on-exec).
    Some(unsafe { OwnedFd::from_raw_fd(raw) })
}
