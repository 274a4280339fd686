//! Reading a copy again: into a buffer of our own, never into a frame that
//! somebody may be served from.

use std::sync::Arc;

use terrace_core::{BlockHeader, Done, Fault, IoClass, OpId};
use terrace_lane::fold;

use crate::api::Complete;
use crate::device::{BlockIo, IoBuffer, IoOp, IoRequest, PagePool};
use crate::header::decode_header;
use crate::work::Workers;

const PAGE: usize = 4096;

/// Reads `bytes` from `offset`, compares them with `expect`, and completes `op`.
pub(crate) fn start(
    io: &Arc<dyn BlockIo>,
    (op, offset, bytes): (OpId, u64, u64),
    expect: BlockHeader,
    (pool, workers, complete): (Arc<PagePool>, Workers, Arc<Complete>),
) {
    let pages = pool.take(bytes);
    let done = move |buffer: IoBuffer, outcome: Result<(), Fault>| {
        let Some(pages) = buffer.into_pages() else { return complete(op, Err(Fault::Device)) };
        if let Err(fault) = outcome {
            pool.give(pages);
            return complete(op, Err(fault));
        }
        workers.push(Box::new(move || {
            let outcome =
                if holds(pages.as_slice(), &expect) { Ok(Done::Plain) } else { Err(Fault::Checksum) };
            pool.give(pages);
            complete(op, outcome);
        }));
    };
    let buffer = IoBuffer::Pages(pages);
    let class = IoClass::Scrub;
    io.submit(IoRequest { op: IoOp::Read, offset, bytes, buffer, class, done: Box::new(done) });
}

/// Are these the header page and the payload of this block? Any bytes may be given.
pub(crate) fn holds(frame: &[u8], expect: &BlockHeader) -> bool {
    let Some((page, rest)) = frame.split_at_checked(PAGE) else { return false };
    let payload = usize::try_from(expect.length.get()).ok().and_then(|length| rest.get(..length));
    decode_header(page).is_ok_and(|found| found == *expect)
        && payload
            .is_some_and(|bytes| fold::checksum(expect.block, expect.generation, bytes) == expect.checksum)
}
