//! Chunks that pass between processes by their descriptors, as on the lane, and
//! outlive the process that made them.

use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;

use terrace_core::{ByteCount, MIB};
use terrace_gpudirect::{Chunk, Cuda, Device, HbmStatus, HostOnly, Span, probe};

use crate::common::{CHUNK, contents, copy, host, on, pattern};
use crate::fake::{self, Driver, Killed};

fn send(socket: &UnixStream, descriptor: &OwnedFd) {
    let mut byte = [1_u8];
    let mut data = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control = [0_u64; 8];
    // SAFETY: all-zero bytes are a valid `msghdr`; pointers and lengths are those of the arrays above, which live on.
    unsafe {
        let mut message: libc::msghdr = MaybeUninit::zeroed().assume_init();
        message.msg_iov = &raw mut data;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(descriptor.as_raw_fd());
        assert_eq!(libc::sendmsg(socket.as_raw_fd(), &raw const message, 0), 1);
    }
}

fn receive(socket: &UnixStream) -> OwnedFd {
    let mut byte = [0_u8];
    let mut data = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control = [0_u64; 8];
    // SAFETY: as in `send`; the kernel writes one header with one descriptor, which is ours alone.
    unsafe {
        let mut message: libc::msghdr = MaybeUninit::zeroed().assume_init();
        message.msg_iov = &raw mut data;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        assert_eq!(libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC), 1);
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        assert!(!header.is_null(), "a message with a descriptor");
        OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<i32>().read_unaligned())
    }
}

/// Makes a chunk with a pattern, sends it, and lives until it is killed.
fn export(device: &dyn Device) {
    let chunk = device.create(CHUNK).unwrap();
    let buffer = host(CHUNK.get());
    buffer.copy_from(&pattern(buffer.len(), 9));
    copy(device, Span::Host(buffer), on(&chunk, 0, CHUNK.get())).unwrap();
    // SAFETY: the parent gave the socket as standard input, which nothing else in this process uses.
    let mut socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    send(&socket, &chunk.export().unwrap());
    // Whatever comes is written to the end of the chunk; at the end of the stream, only a kill ends this.
    let mut byte = [0];
    while socket.read(&mut byte).unwrap() == 1 {
        let last = host(4096);
        last.copy_from(&[byte[0]; 4096]);
        copy(device, Span::Host(last), on(&chunk, CHUNK.get() - 4096, 4096)).unwrap();
        socket.write_all(&byte).unwrap();
    }
    loop {
        std::thread::park();
    }
}

fn read(device: &dyn Device, chunk: &Arc<Chunk>) -> Vec<u8> {
    let buffer = host(CHUNK.get());
    copy(device, on(chunk, 0, CHUNK.get()), Span::Host(buffer.clone())).unwrap();
    contents(&buffer)
}

/// Imports the other process's chunk, sees a store of it, kills it, reads on; imports once more from the descriptor of
/// the dead process.
fn import(device: &dyn Device, mut exporter: Command) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut child = Killed(exporter.stdin(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap());
    let descriptor = receive(&ours);
    let again = descriptor.try_clone().unwrap();
    let chunk = device.import(descriptor, CHUNK).unwrap();
    assert_eq!(device.room().unwrap().imports, 1);
    let mut expected = pattern(read(device, &chunk).len(), 9);
    assert!(read(device, &chunk) == expected, "the other process's bytes, without a copy of them");
    ours.write_all(&[0x5A]).unwrap();
    ours.read_exact(&mut [0]).unwrap();
    let last = expected.len() - 4096;
    expected[last..].fill(0x5A);
    assert!(read(device, &chunk) == expected, "it is the same memory, not a copy");
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    assert!(read(device, &chunk) == expected, "memory lives as long as somebody maps it");
    let more = device.import(again, CHUNK).unwrap();
    assert!(read(device, &more) == expected, "a descriptor outlives the process that made the memory");
    drop((chunk, more));
    assert_eq!(device.room().unwrap().imports, 0);
}

fn stand_in() -> HostOnly {
    HostOnly::new(0, ByteCount::new(16 * MIB)).unwrap()
}

/// Runs in a process of its own, under the test below.
#[test]
fn in_child() {
    match fake::part().as_deref() {
        Some("host-export") => export(&stand_in()),
        Some("cuda-export") => export(&Cuda::open(0).unwrap()),
        Some("host-import") => {
            import(&stand_in(), fake::command("pass::in_child", "host-export", Driver::Fake).unwrap());
        }
        Some("cuda-import") => {
            let exporter = fake::command("pass::in_child", "cuda-export", Driver::Fake).unwrap();
            import(&Cuda::open(0).unwrap(), exporter);
        }
        Some("real-export") => export(&Cuda::open(0).unwrap()),
        Some("real-import") => {
            let exporter = fake::command("pass::in_child", "real-export", Driver::Real).unwrap();
            import(&Cuda::open(0).unwrap(), exporter);
        }
        Some(_) | None => return,
    }
    fake::ran(&fake::part().unwrap());
}

/// A worker could lose its mapping, or read other bytes, when the daemon that made a chunk is killed: export from a
/// process, kill it, read on, and import from what it left.
#[test]
fn chunks_outlive_their_maker() {
    fake::run("pass::in_child", "host-import", Driver::Fake);
    fake::run("pass::in_child", "cuda-import", Driver::Fake);
    match probe() {
        HbmStatus::Off { reason } => eprintln!("skipped on a device: {reason}"),
        HbmStatus::Present { .. } => fake::run("pass::in_child", "real-import", Driver::Real),
    }
}
