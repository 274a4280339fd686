//! I/O beside the data path: superblocks and scans, on tokio-uring, or with
//! plain system calls where io_uring is forbidden.
//!
//! Each call runs on a thread of its own, so that a caller inside another
//! runtime may use it; it blocks until the I/O is done.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_uring::buf::BoundedBuf;

use crate::api::Backend;
use crate::device::{AlignedPages, DeviceFile};
use crate::memory::PAGE_BYTES;

/// Reads in flight at once.
const READS_MAX: usize = 64;
/// Threads that read pages where io_uring is forbidden.
const PLAIN_READERS: usize = 16;

/// Where pages lie, each with a mark of the caller's.
pub(crate) type Places<T> = Box<dyn Iterator<Item = (T, u64)> + Send>;
/// Takes a page, or the error of reading it. False: no more are wanted.
pub(crate) type TakePage<T> = Box<dyn FnMut(T, io::Result<&[u8]>) -> bool + Send>;

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

    /// Reads single pages, many at once and so in any order, and gives each to `take` on the thread
    /// that reads. What lies behind the end of the file reads as zero.
    pub(crate) fn read_pages<T: Send + 'static>(
        &self,
        places: Places<T>,
        take: TakePage<T>,
    ) -> io::Result<()> {
        on_thread(move || match self.runtime() {
            Some(runtime) => runtime.block_on(self.pages_ring(places, take)),
            None => {
                self.pages_plain(places, take);
                Ok(())
            }
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
            let tasks: Vec<_> = piece
                .iter()
                .map(|&(offset, bytes)| {
                    let file = Rc::clone(&file);
                    tokio_uring::spawn(async move {
                        let (outcome, pages) = read_whole(&file, AlignedPages::new(bytes), offset).await;
                        outcome.map(|()| pages)
                    })
                })
                .collect();
            for task in tasks {
                read.push(task.await.unwrap_or_else(|error| Err(io::Error::other(error))));
            }
        }
        Ok(read)
    }

    /// As many tasks as reads in flight, each with one page that it uses again and again.
    async fn pages_ring<T: 'static>(&self, places: Places<T>, take: TakePage<T>) -> io::Result<()> {
        let shared = Rc::new(Pages {
            file: self.ring_file()?,
            places: RefCell::new(places),
            take: RefCell::new(take),
            wanted: Cell::new(true),
        });
        let tasks: Vec<_> = (0..READS_MAX).map(|_| tokio_uring::spawn(read_on(Rc::clone(&shared)))).collect();
        for task in tasks {
            task.await.map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn pages_plain<T: Send>(&self, places: Places<T>, take: TakePage<T>) {
        let shared = Mutex::new((places, take, true));
        let read = || loop {
            let next = {
                let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                if shared.2 { shared.0.next() } else { None }
            };
            let Some((mark, offset)) = next else { return };
            let page = self.read_plain((offset, PAGE_BYTES));
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared.2 &= (shared.1)(mark, page.as_ref().map(AlignedPages::as_slice).map_err(copy_of));
        };
        std::thread::scope(|scope| {
            for _ in 1..PLAIN_READERS {
                scope.spawn(read);
            }
            read();
        });
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

/// What the tasks of one call share.
struct Pages<T> {
    file: tokio_uring::fs::File,
    places: RefCell<Places<T>>,
    take: RefCell<TakePage<T>>,
    wanted: Cell<bool>,
}

async fn read_on<T>(shared: Rc<Pages<T>>) {
    let mut page = AlignedPages::new(PAGE_BYTES);
    while shared.wanted.get() {
        let next = shared.places.borrow_mut().next();
        let Some((mark, offset)) = next else { return };
        let (outcome, back) = read_whole(&shared.file, page, offset).await;
        page = back;
        let wanted = (shared.take.borrow_mut())(mark, outcome.map(|()| page.as_slice()));
        shared.wanted.set(shared.wanted.get() && wanted);
    }
}

/// Fills the pages; behind the end of the file with zeros.
async fn read_whole(
    file: &tokio_uring::fs::File,
    mut pages: AlignedPages,
    offset: u64,
) -> (io::Result<()>, AlignedPages) {
    let length = pages.as_slice().len();
    let mut done = 0usize;
    while done < length {
        let (moved, slice) = file.read_at(pages.slice(done..), offset + done as u64).await;
        pages = slice.into_inner();
        match moved {
            Ok(0) => {
                pages.as_mut_slice()[done..].fill(0);
                break;
            }
            Ok(moved) => done += moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (Err(error), pages),
        }
    }
    (Ok(()), pages)
}

fn copy_of(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| io::Error::from(error.kind()), io::Error::from_raw_os_error)
}

fn on_thread<T: Send>(act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("media-side-io".to_owned()).spawn_scoped(scope, act)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the side I/O thread panicked")))
    })
}
