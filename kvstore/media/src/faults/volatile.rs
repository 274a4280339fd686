//! A device with a cache that a power cut empties.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use terrace_core::{Fault, IoClass};

use super::{answer, content, overwrite, read_buffer};
use crate::device::{AlignedPages, BlockIo, IoBuffer, IoFacts, IoOp, IoRequest};
use crate::memory::PAGE_BYTES;

/// Keeps writes in memory until a sync, as a drive's cache may; [`Self::cut`] loses them.
pub struct VolatileDevice {
    inner: Arc<dyn BlockIo>,
    cache: Arc<Mutex<BTreeMap<u64, Vec<u8>>>>,
}

impl VolatileDevice {
    /// Starts with an empty cache.
    pub fn new(inner: Arc<dyn BlockIo>) -> Self {
        Self { inner, cache: Arc::default() }
    }

    /// The power goes: what was not synced is gone.
    pub fn cut(&self) {
        lock(&self.cache).clear();
    }

    /// The power goes while some of the cache is being written: every second page survives.
    pub fn cut_unevenly(&self) {
        let survivors: Vec<_> = std::mem::take(&mut *lock(&self.cache)).into_iter().step_by(2).collect();
        for (offset, page) in survivors {
            let _ = self.write_now(offset, &page);
        }
    }

    fn write_now(&self, offset: u64, page: &[u8]) -> Result<(), Fault> {
        write_through(&self.inner, offset, page)
    }
}

fn write_through(inner: &Arc<dyn BlockIo>, offset: u64, page: &[u8]) -> Result<(), Fault> {
    let (sender, receiver) = mpsc::channel();
    let mut pages = AlignedPages::new(PAGE_BYTES);
    pages.as_mut_slice().copy_from_slice(page);
    inner.submit(IoRequest {
        op: IoOp::Write,
        offset,
        bytes: PAGE_BYTES,
        buffer: IoBuffer::Pages(pages),
        class: IoClass::DecodeFetch,
        done: Box::new(move |_, outcome| {
            let _ = sender.send(outcome);
        }),
    });
    receiver.recv().unwrap_or(Err(Fault::Device))
}

impl BlockIo for VolatileDevice {
    fn submit(&self, mut request: IoRequest) {
        match request.op {
            IoOp::Forget(_) => self.inner.submit(request),
            IoOp::Write => {
                let Some(pages) = content(&request) else { return answer(request, Err(Fault::Device)) };
                let mut cache = lock(&self.cache);
                for (number, page) in pages.as_slice().chunks_exact(4096).enumerate() {
                    cache.insert(request.offset + number as u64 * PAGE_BYTES, page.to_vec());
                }
                drop(cache);
                answer(request, Ok(()));
            }
            IoOp::Read => {
                let (cache, done) = (Arc::clone(&self.cache), request.done);
                let (offset, bytes) = (request.offset, request.bytes);
                request.done = Box::new(move |mut buffer, outcome| {
                    let mut copy = AlignedPages::new(bytes);
                    read_buffer(&buffer, copy.as_mut_slice());
                    for (number, page) in copy.as_mut_slice().chunks_exact_mut(4096).enumerate() {
                        if let Some(newer) = lock(&cache).get(&(offset + number as u64 * PAGE_BYTES)) {
                            page.copy_from_slice(newer);
                        }
                    }
                    overwrite(&mut buffer, copy.as_slice());
                    done(buffer, outcome);
                });
                self.inner.submit(request);
            }
            IoOp::Sync => {
                let (inner, cache) = (Arc::clone(&self.inner), std::mem::take(&mut *lock(&self.cache)));
                // Waits for the inner device, which its own threads must not.
                std::thread::spawn(move || {
                    let written =
                        cache.iter().try_for_each(|(offset, page)| write_through(&inner, *offset, page));
                    match written {
                        Ok(()) => inner.submit(request),
                        Err(fault) => answer(request, Err(fault)),
                    }
                });
            }
        }
    }

    fn facts(&self) -> IoFacts {
        self.inner.facts()
    }
}

fn lock(cache: &Mutex<BTreeMap<u64, Vec<u8>>>) -> MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
    cache.lock().unwrap_or_else(PoisonError::into_inner)
}
