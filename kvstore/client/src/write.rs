//! Filling frames and publishing them.

use std::sync::Arc;
use std::sync::atomic::{self, Ordering};
use std::time::Duration;

use terrace_core::{BlockId, ByteCount, Checksum, Durability, Fence, SealOutcome};
use terrace_lane::{Called, Mapping, SharedBytes, SharedBytesMut};
use terrace_proto::v1::lane_request::Op;
use terrace_proto::v1::lane_response::Result as Answer;
use terrace_proto::v1::{AbortRequest, SealBlock, SealRequest};

use crate::again;
use crate::chunks::{Mapped, WriterToken};
use crate::convert::{durability_to_wire, seals_from_wire};
use crate::early::FilledEarly;
use crate::error::ClientError;
use crate::lease::{Frame, Lease, Outcome, in_host_memory};
use crate::read::ReadBlock;

/// How to lease for writing.
#[derive(Clone, Copy, Debug, Default)]
pub struct WriteOptions {
    /// Time to live; `None` is the daemon's default. Leases renew themselves
    /// while their guards live.
    pub ttl: Option<Duration>,
    /// How long the answer may wait for frames.
    pub wait: Duration,
}

/// Frames reserved for writing. Dropping it gives back what is not sealed, and
/// unpins what is.
#[derive(Debug)]
pub struct WriteLease<B = WriteBlock> {
    // Before the grants: the lease ends before its windows go back.
    pub(crate) lease: Option<Arc<Lease>>,
    /// One entry a key, in order.
    pub grants: Vec<Outcome<B>>,
}

/// A frame to fill, wherever it is.
pub trait Fill {
    /// The right to store.
    type Writer;
    /// A guard to read it by.
    type Reader;

    /// Payload length.
    fn length(&self) -> ByteCount;
    /// Whether stores are allowed.
    fn is_writable(&self) -> bool;
    /// Nobody stores from now on. The window is not handed back while the caller has the right to.
    fn stop(&mut self) -> Option<Self::Writer>;
    /// Stores are allowed again.
    fn go_on(&mut self, writer: Self::Writer);
    /// It was sealed with this checksum.
    fn sealed(&mut self, checksum: Checksum);
    /// A guard, if it was sealed.
    fn reader(&self) -> Option<Self::Reader>;
}

impl<B: Fill> WriteLease<B> {
    /// The daemon's number of the lease; `None` when nothing was granted.
    pub fn id(&self) -> Option<u64> {
        self.lease.as_ref().map(|lease| lease.id())
    }

    /// The block at a position, if it was granted.
    pub fn block(&self, index: u32) -> Option<&B> {
        self.grants.get(index as usize).and_then(Outcome::granted)
    }

    /// The block at a position, if it was granted.
    pub fn block_mut(&mut self, index: u32) -> Option<&mut B> {
        self.grants.get_mut(index as usize).and_then(Outcome::granted_mut)
    }

    /// Publishes the blocks at these positions with checksums that the caller
    /// computed. One outcome a position. The blocks are immutable from here on:
    /// they cannot be stored into again unless the daemon refused. Sealed blocks
    /// stay pinned until the lease goes. When cancelled or not answered, they may
    /// or may not be sealed.
    ///
    /// # Errors
    /// A position that cannot be written, or the session has ended, or the
    /// daemon refused: then nothing was sealed.
    pub async fn seal_with(
        &mut self,
        blocks: &[(u32, Checksum)],
        durability: Durability,
    ) -> Result<Vec<SealOutcome>, ClientError> {
        let mut wanted = Vec::with_capacity(blocks.len());
        for (index, checksum) in blocks {
            let length = self.writable(*index)?.length().get();
            wanted.push(SealBlock { index: *index, length, checksum: checksum.get() });
        }
        let Some(lease) = self.lease.clone().filter(|_| !wanted.is_empty()) else {
            return Ok(Vec::new());
        };
        let writers = self.stop(blocks.iter().map(|(index, _)| *index));
        let sealed = seal(&lease, wanted, durability).await;
        match &sealed {
            Ok(_) => {
                for (index, checksum) in blocks {
                    if let Some(block) = self.block_mut(*index) {
                        block.sealed(*checksum);
                    }
                }
            }
            Err(error) => self.go_on_after(error, writers),
        }
        sealed
    }

    /// Gives back the frames at these positions unwritten. Nobody may store
    /// into them any more. Positions that are not writable are skipped.
    ///
    /// # Errors
    /// The session has ended, or the daemon refused.
    pub async fn abort(&mut self, indexes: &[u32]) -> Result<u32, ClientError> {
        let indexes: Vec<u32> =
            indexes.iter().copied().filter(|index| self.writable(*index).is_ok()).collect();
        let Some(lease) = self.lease.clone().filter(|_| !indexes.is_empty()) else {
            return Ok(0);
        };
        let writers = self.stop(indexes.iter().copied());
        let aborted = abort(&lease, indexes).await;
        if let Err(error) = &aborted {
            self.go_on_after(error, writers);
        }
        aborted
    }

    /// A reading guard of a block that this lease has sealed. It shares the
    /// lease, and outlives this value. `None` if the block was not sealed. If
    /// the seal lost ([`SealOutcome::Already`] and worse) the guard may be stale.
    pub fn reader(&self, index: u32) -> Option<B::Reader> {
        self.block(index)?.reader()
    }

    /// Ends the lease now and waits until the daemon knows: what is not sealed
    /// is given back, what is sealed is unpinned. Nobody may use any block of it
    /// any more.
    ///
    /// # Errors
    /// The session has ended; so has the lease.
    pub async fn release(self) -> Result<(), ClientError> {
        match &self.lease {
            Some(lease) => lease.release().await,
            None => Ok(()),
        }
    }

    /// Takes the right to store before the daemon is told so, for it may have been told although no answer comes.
    fn stop(&mut self, indexes: impl Iterator<Item = u32>) -> Vec<(u32, B::Writer)> {
        indexes.filter_map(|index| Some((index, self.block_mut(index)?.stop()?))).collect()
    }

    /// What the daemon refused, it has not done.
    fn go_on_after(&mut self, error: &ClientError, writers: Vec<(u32, B::Writer)>) {
        if !matches!(error, ClientError::Refused { .. } | ClientError::Throttled { .. }) {
            return;
        }
        for (index, writer) in writers {
            if let Some(block) = self.block_mut(index) {
                block.go_on(writer);
            }
        }
    }

    pub(crate) fn writable(&self, index: u32) -> Result<&B, ClientError> {
        self.block(index).filter(|block| block.is_writable()).ok_or(ClientError::NotWritable { index })
    }
}

impl WriteLease {
    /// As [`WriteLease::seal_with`], with the checksums of what is in the frames now.
    ///
    /// # Errors
    /// As [`WriteLease::seal_with`].
    pub async fn seal(
        &mut self,
        indexes: &[u32],
        durability: Durability,
    ) -> Result<Vec<SealOutcome>, ClientError> {
        let mut blocks = Vec::with_capacity(indexes.len());
        for index in indexes {
            let block = self.writable(*index)?;
            blocks.push((*index, block.seal_value().1));
        }
        self.seal_with(&blocks, durability).await
    }

    /// Ends the lease now. The daemon is told with the next question, or in a moment.
    pub(crate) fn end_soon(self) {
        if let Some(lease) = &self.lease {
            lease.end_soon();
        }
    }

    /// Its blocks are more than the cache holds beside what else the processor works at.
    pub(crate) fn go_past_the_cache(&mut self) {
        for block in self.grants.iter_mut().filter_map(Outcome::granted_mut) {
            if let Some(writer) = &mut block.writer {
                writer.view.go_past_the_cache();
            }
        }
    }

    /// Whole blocks that are filled from now on are whole for other threads after [`terrace_lane::drain`] only.
    pub(crate) fn drain_later(&mut self) {
        for block in self.grants.iter_mut().filter_map(Outcome::granted_mut) {
            if let Some(writer) = &mut block.writer {
                writer.view.drain_later();
            }
        }
    }
}

/// Publishes blocks of a lease: one outcome each.
async fn seal(
    lease: &Lease,
    blocks: Vec<SealBlock>,
    durability: Durability,
) -> Result<Vec<SealOutcome>, ClientError> {
    let session = lease.session();
    let asked = blocks.len();
    let request = SealRequest {
        request_id: session.keeper.request_id(),
        lease: lease.id(),
        blocks,
        durability: durability_to_wire(durability),
    };
    let answer = again::seal(session, request).await?;
    let outcomes = seals_from_wire(answer.outcomes())?;
    if outcomes.len() != asked {
        return Err(ClientError::Protocol { detail: "a seal that does not answer each block" });
    }
    Ok(outcomes)
}

/// Gives frames of a lease back unwritten; answers how many. No index at all would mean every one.
async fn abort(lease: &Lease, indexes: Vec<u32>) -> Result<u32, ClientError> {
    let session = lease.session();
    let request = AbortRequest { request_id: session.keeper.request_id(), lease: lease.id(), indexes };
    match session.link.call(Op::Abort(request)).await?.answer {
        Answer::Abort(answer) => Ok(answer.aborted),
        _ => Err(ClientError::Protocol { detail: "an abort was asked for" }),
    }
}

/// A frame of this session's window, to be filled with one block.
#[derive(Debug)]
pub struct WriteBlock {
    bytes: SharedBytes,
    mapping: Arc<Mapping>,
    chunk: u64,
    frame: u32,
    offset: u64,
    fence: Fence,
    block: BlockId,
    generation: u64,
    sealed: Option<Checksum>,
    // Before the writer: the lease ends before its window goes back.
    lease: Arc<Lease>,
    // Present while stores are allowed.
    writer: Option<Writer>,
}

/// The right to store. The view goes before the token that holds the window.
#[derive(Debug)]
pub struct Writer {
    view: SharedBytesMut,
    _window: Arc<WriterToken>,
}

impl WriteBlock {
    pub(crate) fn new(frame: Frame, lease: Arc<Lease>) -> Result<Self, ClientError> {
        let outside = ClientError::Protocol { detail: "a frame outside its chunk" };
        let mapping = in_host_memory(frame.mapping)?;
        let view = mapping.view_mut(frame.offset, frame.length).ok_or(outside)?;
        let window =
            frame.writer.ok_or(ClientError::Protocol { detail: "a frame to write without its window" })?;
        Ok(Self {
            bytes: view.bytes().clone(),
            mapping,
            chunk: frame.chunk,
            frame: frame.frame,
            offset: frame.offset,
            fence: frame.fence,
            block: frame.block,
            generation: frame.generation,
            sealed: None,
            lease,
            writer: Some(Writer { view, _window: window }),
        })
    }

    /// Whether this is what was filled before it was granted.
    pub(crate) fn is(&self, early: &FilledEarly) -> bool {
        let FilledEarly { chunk, frame, block, generation, checksum: _ } = *early;
        (chunk, frame, block, generation) == (self.chunk, self.frame, self.block, self.generation)
    }

    /// Identity of the block.
    pub fn id(&self) -> BlockId {
        self.block
    }

    /// Payload length.
    pub fn length(&self) -> ByteCount {
        ByteCount::new(self.bytes.len() as u64)
    }

    /// Generation of its space when it was leased, which its checksum is made with.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether the frame is still ours: its lease has not ended, its fence has
    /// not moved. Ask before sealing, and after reading what was written.
    pub fn is_valid(&self) -> bool {
        atomic::fence(Ordering::Acquire);
        self.mapping.fence(self.frame) == Some(self.fence) && self.lease.is_usable()
    }

    /// Whether stores are allowed: not sealed, not aborted.
    pub fn is_writable(&self) -> bool {
        self.writer.is_some()
    }

    /// What is in the frame now.
    pub fn bytes(&self) -> &SharedBytes {
        &self.bytes
    }

    /// The first byte, for computing in place. Storing is allowed until the
    /// block is sealed or aborted or dropped, and faults some time afterwards.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.bytes.as_ptr().cast_mut()
    }

    /// Fills the whole block.
    ///
    /// # Errors
    /// A payload that is not one block long, or a block that was sealed or aborted.
    pub fn write(&mut self, payload: &[u8]) -> Result<(), ClientError> {
        self.check_length(payload)?;
        self.write_at(0, payload)
    }

    /// Fills the whole block and computes its checksum in the same pass, for [`WriteLease::seal_with`].
    ///
    /// # Errors
    /// As [`WriteBlock::write`].
    pub fn write_checked(&mut self, payload: &[u8]) -> Result<Checksum, ClientError> {
        self.write_checked_by(payload, Called::NONE)
    }

    /// The same by those that are called.
    pub(crate) fn write_checked_by(
        &mut self,
        payload: &[u8],
        called: Called,
    ) -> Result<Checksum, ClientError> {
        self.check_length(payload)?;
        let writer = self.writer.as_ref().ok_or(ClientError::NotWritable { index: self.frame })?;
        Ok(writer.view.copy_from_and_checksum(payload, self.block, self.generation, called))
    }

    fn check_length(&self, payload: &[u8]) -> Result<(), ClientError> {
        let (found, expected) = (payload.len() as u64, self.bytes.len() as u64);
        if found != expected {
            return Err(ClientError::WrongLength { index: 0, found, expected });
        }
        Ok(())
    }

    /// Fills a part of the block.
    ///
    /// # Errors
    /// A block that was sealed or aborted.
    ///
    /// # Panics
    /// If the part does not fit.
    pub fn write_at(&mut self, offset: usize, part: &[u8]) -> Result<(), ClientError> {
        let writer = self.writer.as_ref().ok_or(ClientError::NotWritable { index: self.frame })?;
        writer.view.copy_from(offset, part);
        Ok(())
    }

    /// Length and checksum of what is in the frame now.
    pub fn seal_value(&self) -> (ByteCount, Checksum) {
        (self.length(), self.bytes.checksum(self.block, self.generation))
    }
}

impl Fill for WriteBlock {
    type Writer = Writer;
    type Reader = ReadBlock;

    fn length(&self) -> ByteCount {
        self.length()
    }

    fn is_writable(&self) -> bool {
        self.is_writable()
    }

    fn stop(&mut self) -> Option<Writer> {
        self.writer.take()
    }

    fn go_on(&mut self, writer: Writer) {
        self.writer = Some(writer);
    }

    fn sealed(&mut self, checksum: Checksum) {
        self.sealed = Some(checksum);
    }

    fn reader(&self) -> Option<ReadBlock> {
        let frame = Frame {
            mapping: Mapped::Host(Arc::clone(&self.mapping)),
            chunk: self.chunk,
            frame: self.frame,
            offset: self.offset,
            fence: self.fence,
            length: self.length(),
            checksum: self.sealed?,
            block: self.block,
            generation: self.generation,
            writer: None,
        };
        ReadBlock::new(frame, Arc::clone(&self.lease)).ok()
    }
}
