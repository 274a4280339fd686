//! I/O beside the data path: superblocks and scans, on tokio-uring, or with
//! plain system calls where io_uring is forbidden.
//!
//! Each call runs on a thread of its own, so that a caller inside another
//! runtime may use it; it blocks until the I/O is done.

use std::io;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use tokio_uring::buf::BoundedBuf;

use crate::api::Backend;
use crate::device::{AlignedPages, DeviceFile};

/// Reads in flight at once.
const READS_MAX: usize = 64;

/// Reads and writes of one device that are not block I/O.
#[derive(Clone)]
pub(crate) struct SideIo {
    file: Arc<DeviceFile>,
    backend: Backend,
}

impl SideIo {
    pub(crate) fn new(file: Arc<DeviceFile>, backend: Backend) -> Self {
        Self { file, backend }
    }

    /// Reads page-aligned ranges of (offset, bytes). What lies behind the end of the file reads as zero.
    pub(crate) fn read_many(&self, ranges: &[(u64, u64)]) -> io::Result<Vec<io::Result<AlignedPages>>> {
        on_thread(|| match self.runtime() {
            Some(runtime) => runtime.block_on(self.read_ring(ranges)),
            None => Ok(ranges.iter().map(|range| self.read_plain(*range)).collect()),
        })
    }

    /// Writes pages and syncs. After an error nothing is known of what was written.
    pub(crate) fn write_synced(&self, offset: u64, pages: AlignedPages) -> io::Result<()> {
        on_thread(|| match self.runtime() {
            Some(runtime) => runtime.block_on(async {
                let file = self.ring_file()?;
                file.write_all_at(pages, offset).await.0?;
                file.sync_data().await
            }),
            None => {
                self.file.file().write_all_at(pages.as_slice(), offset)?;
                self.file.sync()
            }
        })
    }

    fn runtime(&self) -> Option<tokio_uring::Runtime> {
        match self.backend {
            Backend::Pread => None,
            Backend::Auto | Backend::IoUring => tokio_uring::Runtime::new(&tokio_uring::builder()).ok(),
        }
    }

    fn ring_file(&self) -> io::Result<tokio_uring::fs::File> {
        Ok(tokio_uring::fs::File::from_std(self.file.file().try_clone()?))
    }

    async fn read_ring(&self, ranges: &[(u64, u64)]) -> io::Result<Vec<io::Result<AlignedPages>>> {
        let file = Rc::new(self.ring_file()?);
        let mut read = Vec::with_capacity(ranges.len());
        for piece in ranges.chunks(READS_MAX) {
            let tasks: Vec<_> =
                piece.iter().map(|range| tokio_uring::spawn(read_range(Rc::clone(&file), *range))).collect();
            for task in tasks {
                read.push(task.await.unwrap_or_else(|error| Err(io::Error::other(error))));
            }
        }
        Ok(read)
    }

    fn read_plain(&self, (offset, bytes): (u64, u64)) -> io::Result<AlignedPages> {
        let mut pages = AlignedPages::new(bytes);
        let mut done = 0usize;
        let target = pages.as_mut_slice();
        while done < target.len() {
            match self.file.file().read_at(&mut target[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(moved) => done += moved,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(pages)
    }
}

async fn read_range(
    file: Rc<tokio_uring::fs::File>,
    (offset, bytes): (u64, u64),
) -> io::Result<AlignedPages> {
    let mut pages = AlignedPages::new(bytes);
    let length = pages.as_slice().len();
    let mut done = 0usize;
    while done < length {
        let (moved, slice) = file.read_at(pages.slice(done..), offset + done as u64).await;
        pages = slice.into_inner();
        match moved {
            Ok(0) => break,
            Ok(moved) => done += moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(pages)
}

fn on_thread<T: Send>(act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("media-side-io".to_owned()).spawn_scoped(scope, act)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the side I/O thread panicked")))
    })
}
