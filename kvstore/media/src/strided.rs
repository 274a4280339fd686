//! What a device gives to somebody who reads single pages far apart: the
//! measure of a scan. A bare io_uring loop, for benchmarks.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};

use crate::device::AlignedPages;
use crate::memory::PAGE_BYTES;

/// Reads the page at each offset, past the page cache, `depth` at a time, and says how long that took.
///
/// # Errors
/// io_uring is not to be had, or a read failed or was cut short.
pub fn strided_reads(path: &Path, offsets: &[u64], depth: u32) -> io::Result<Duration> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let depth = depth.clamp(1, 4096);
    let mut ring = IoUring::new(depth)?;
    let mut pages: Vec<AlignedPages> = (0..depth).map(|_| AlignedPages::new(PAGE_BYTES)).collect();
    let mut vacant: Vec<usize> = (0..pages.len()).collect();
    let mut offsets = offsets.iter();
    let mut running = 0usize;
    let mut outcome = Ok(());
    let began = Instant::now();
    loop {
        while outcome.is_ok()
            && let Some(place) = vacant.pop()
        {
            let Some(offset) = offsets.next() else {
                vacant.push(place);
                break;
            };
            let target = pages[place].as_mut_slice().as_mut_ptr();
            let page = u32::try_from(PAGE_BYTES).expect("4096");
            let read = opcode::Read::new(types::Fd(file.as_raw_fd()), target, page).offset(*offset);
            // SAFETY: the page belongs to this read until its completion, and nothing is dropped before the
            // last completion: the loop ends when none runs.
            let pushed = unsafe { ring.submission().push(&read.build().user_data(place as u64)) };
            pushed.expect("the ring has an entry for each page");
            running += 1;
        }
        if running == 0 {
            outcome?;
            return Ok(began.elapsed());
        }
        match ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            // What runs can be neither waited for nor freed.
            Err(error) => panic!("io_uring_enter: {error}"),
        }
        let done: Vec<(u64, i32)> =
            ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (place, result) in done {
            running -= 1;
            vacant.push(usize::try_from(place).expect("a place that we gave"));
            if result < 0 {
                outcome = Err(io::Error::from_raw_os_error(-result));
            } else if i64::from(result) != i64::try_from(PAGE_BYTES).expect("4096") {
                outcome = Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}
