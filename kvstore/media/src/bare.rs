//! A bare io_uring loop over chunk memory and a device's file, for benchmarks:
//! what kernel and device give with nothing of ours in between.
//!
//! It uses what the device threads use (registered chunks and files,
//! SINGLE_ISSUER and DEFER_TASKRUN, O_DIRECT), looks at the bytes only if it is told
//! to, and tells nobody. Not for the daemon.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use terrace_core::BlockHeader;

use crate::memory::ChunkMemory;

const ENTRIES: u32 = 128;

/// What the loop does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BareOp {
    /// Device to memory.
    Read,
    /// The same, and the payload is compared with the checksum while the device works on what comes next.
    ReadChecked,
    /// Memory to device.
    Write,
}

/// CPU time of all threads of this process, those that ended included.
pub fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, for which there is room.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// A ring with one file and some chunks registered. Stays on its thread.
pub struct BareLoop {
    ring: IoUring,
    /// Its number in the ring's table is 0.
    _file: File,
    /// Registered in this order.
    chunks: Vec<Arc<ChunkMemory>>,
}

impl BareLoop {
    /// Opens the file again and registers everything.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(path: &Path, chunks: Vec<Arc<ChunkMemory>>) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
        let ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(ENTRIES)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let mut vectors = Vec::with_capacity(chunks.len());
        for chunk in &chunks {
            let (base, bytes) = chunk.mapping();
            let length = usize::try_from(bytes).map_err(io::Error::other)?;
            vectors.push(libc::iovec { iov_base: base.cast(), iov_len: length });
        }
        // SAFETY: the ranges are mappings of chunks that live as long as the ring, which `Drop` empties first.
        unsafe { ring.submitter().register_buffers(&vectors)? };
        Ok(Self { ring, _file: file, chunks })
    }

    /// Moves one frame an offset, `depth` at once, and says how long that took.
    /// `frames` are (chunk, frame), used in turn; at least `depth` of them. What is checked holds the block `expect`.
    ///
    /// # Errors
    /// If an I/O fails or is cut short, or a frame does not hold `bytes`.
    pub fn run(
        &mut self,
        op: BareOp,
        offsets: &[u64],
        bytes: u32,
        frames: &[(usize, u32)],
        depth: usize,
        expect: &BlockHeader,
    ) -> io::Result<Duration> {
        let mut addresses = Vec::with_capacity(frames.len());
        for (chunk, frame) in frames {
            let memory =
                self.chunks.get(*chunk).filter(|memory| memory.frame_bytes().get() >= u64::from(bytes));
            let memory = memory.ok_or_else(|| io::Error::other("no such frame of that size"))?;
            let slot = u16::try_from(*chunk).map_err(io::Error::other)?;
            addresses.push((memory.frame(*frame).map_err(io::Error::other)?, slot));
        }
        let check = |place: usize| {
            let (chunk, frame) = frames[place];
            self.chunks[chunk].verify(frame, expect).unwrap_or(false)
        };
        drive(&mut self.ring, op, offsets, bytes, &addresses, depth, check)
    }
}

fn drive(
    ring: &mut IoUring,
    op: BareOp,
    offsets: &[u64],
    bytes: u32,
    addresses: &[(*mut u8, u16)],
    depth: usize,
    check: impl Fn(usize) -> bool,
) -> io::Result<Duration> {
    let began = Instant::now();
    let mut next = offsets.iter();
    let mut free: VecDeque<usize> = (0..addresses.len()).collect();
    let (mut unchecked, mut completions) = (Vec::new(), Vec::new());
    let mut running = 0usize;
    let mut failed = None;
    while running < depth
        && let Some(place) = free.pop_front()
        && let Some(offset) = next.next()
    {
        push(ring, op, *offset, bytes, addresses[place], place)?;
        running += 1;
    }
    while running > 0 || !unchecked.is_empty() {
        match ring.submit_and_wait(usize::from(unchecked.is_empty())) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            Ok(_) | Err(_) => {}
        }
        for place in unchecked.drain(..) {
            if op == BareOp::ReadChecked && !check(place) {
                failed = Some(io::Error::other("a frame holds other bytes"));
            }
            free.push_back(place);
        }
        completions.extend(ring.completion());
        // As media: a device without work gets the first at once, and begins while the others are made ready.
        let mut idle = completions.len() == running;
        for completion in completions.drain(..) {
            running -= 1;
            if u32::try_from(completion.result()) != Ok(bytes) {
                failed = Some(io::Error::other(format!("an I/O answered {}", completion.result())));
            }
            unchecked.push(usize::try_from(completion.user_data()).map_err(io::Error::other)?);
            if let Some(offset) = next.next().filter(|_| failed.is_none())
                && let Some(place) = free.pop_front()
            {
                push(ring, op, *offset, bytes, addresses[place], place)?;
                running += 1;
                if std::mem::take(&mut idle) {
                    ring.submit()?;
                }
            }
        }
    }
    failed.map_or_else(|| Ok(began.elapsed()), Err)
}

fn push(
    ring: &mut IoUring,
    op: BareOp,
    offset: u64,
    bytes: u32,
    (address, slot): (*mut u8, u16),
    place: usize,
) -> io::Result<()> {
    let file = types::Fixed(0);
    let entry = match op {
        BareOp::Read | BareOp::ReadChecked => {
            opcode::ReadFixed::new(file, address, bytes, slot).offset(offset).build()
        }
        BareOp::Write => opcode::WriteFixed::new(file, address, bytes, slot).offset(offset).build(),
    };
    // SAFETY: the address is inside a chunk that the loop holds, with room for `bytes`; `drive` leaves only when
    // nothing runs, but for an error of the ring itself, after which `Drop` keeps the chunks.
    unsafe { ring.submission().push(&entry.user_data(place as u64)) }.map_err(io::Error::other)
}

impl Drop for BareLoop {
    fn drop(&mut self) {
        if self.ring.submitter().unregister_buffers().is_err() {
            // The kernel may still write into them.
            self.chunks.drain(..).for_each(std::mem::forget);
        }
    }
}
