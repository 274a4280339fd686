//! A chunk for another process: what it takes to export, pass and map it, when no
//! byte of it moves.

use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, GIB, MIB};
use terrace_gpudirect::{Cuda, Device, DeviceKind, HostOnly};

use crate::rows::{Rows, median};

pub(crate) const NAMES: &[&str] = &["share_chunk_64mib_p50", "chunk_create_64mib_p50"];
/// First argument of the process that maps what it is sent.
pub(crate) const IMPORTER: &str = "--import-chunks";
const CHUNK: ByteCount = ByteCount::new(64 * MIB);
const ROUNDS: usize = 101;

pub(crate) fn measure(device: &Arc<dyn Device>, rows: &mut Rows, until: Instant) {
    match shared(device, until) {
        Ok(p50) => rows.plain(NAMES[0], p50, "us"),
        Err(error) => rows.fail(NAMES[0], &error.to_string()),
    }
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let began = Instant::now();
        match device.create(CHUNK) {
            Ok(_) => times.push(micros(began.elapsed())),
            Err(error) => return rows.fail(NAMES[1], &error.to_string()),
        }
    }
    rows.plain(NAMES[1], median(&times), "us");
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// From the export to the other process's word that the chunk is mapped there.
fn shared(device: &Arc<dyn Device>, until: Instant) -> Result<f64, Box<dyn std::error::Error>> {
    let (mut ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(Duration::from_secs(60)))?;
    let kind = device.info().kind.label();
    let mut importer = Command::new(std::env::current_exe()?)
        .args([IMPORTER, kind, &device.info().ordinal.to_string()])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()?;
    let chunk = device.create(CHUNK)?;
    let mut measured = || -> Result<f64, Box<dyn std::error::Error>> {
        // It has opened its device.
        ours.read_exact(&mut [0])?;
        let mut times = Vec::new();
        while times.len() < ROUNDS && Instant::now() < until {
            let began = Instant::now();
            send(&ours, &chunk.export()?)?;
            ours.read_exact(&mut [0])?;
            times.push(micros(began.elapsed()));
            // It has let go again.
            ours.read_exact(&mut [0])?;
        }
        Ok(median(&times))
    };
    let result = measured();
    // It may have ended already.
    let _ = importer.kill();
    let _ = importer.wait();
    result
}

/// The other process: maps each chunk that comes, says so, lets go, says so.
pub(crate) fn import_until_killed() -> ExitCode {
    match import() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("terrace-gpu-check: the importing process: {error}");
            ExitCode::FAILURE
        }
    }
}

fn import() -> Result<(), Box<dyn std::error::Error>> {
    let ordinal = std::env::args().nth(3).unwrap_or_default().parse()?;
    let device: Box<dyn Device> = if std::env::args().nth(2).as_deref() == Some(DeviceKind::Cuda.label()) {
        Box::new(Cuda::open(ordinal)?)
    } else {
        Box::new(HostOnly::new(ordinal, ByteCount::new(GIB))?)
    };
    // SAFETY: whoever started this process gave the socket as standard input, which nothing else uses.
    let mut socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    socket.write_all(&[0])?;
    while let Some(descriptor) = receive(&socket)? {
        let chunk = device.import(descriptor, CHUNK)?;
        socket.write_all(&[0])?;
        drop(chunk);
        socket.write_all(&[0])?;
    }
    Ok(())
}

/// Room for one header with one descriptor.
type Control = [u64; 8];

fn message(data: &mut libc::iovec, control: &mut Control) -> libc::msghdr {
    // SAFETY: all-zero bytes are a valid `msghdr`.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = data;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of::<Control>();
    message
}

fn send(socket: &UnixStream, descriptor: &OwnedFd) -> std::io::Result<()> {
    let mut byte = [0_u8];
    let mut data = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control = Control::default();
    let mut message = message(&mut data, &mut control);
    // SAFETY: the control memory has room for one header with one descriptor, and lives until the call is over.
    let sent = unsafe {
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(descriptor.as_raw_fd());
        libc::sendmsg(socket.as_raw_fd(), &raw const message, 0)
    };
    if sent == 1 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn receive(socket: &UnixStream) -> std::io::Result<Option<OwnedFd>> {
    let mut byte = [0_u8];
    let mut data = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control = Control::default();
    let mut message = message(&mut data, &mut control);
    // SAFETY: the kernel writes into the memory named above, which lives on; a descriptor that it gives is ours alone.
    unsafe {
        match libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) {
            0 => return Ok(None),
            1 => {}
            _ => return Err(std::io::Error::last_os_error()),
        }
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null() || (*header).cmsg_type != libc::SCM_RIGHTS {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        Ok(Some(OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<i32>().read_unaligned())))
    }
}
