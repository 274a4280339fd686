//! The framing: a 4-byte little-endian length, then the encoded message, with
//! descriptors beside the messages that need them.
//!
//! One connection has one reader and one writer, which may live in different
//! tasks. A reader takes in whatever has arrived and decodes it message by
//! message; a writer collects messages and hands them to the kernel together.

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use prost::{DecodeError, Message};
use tokio::io::Interest;
use tokio::net::UnixStream;

use terrace_proto::MESSAGE_BYTES_MAX;
use terrace_proto::v1::{LaneRequest, LaneResponse, lane_response};

use crate::error::LaneError;
use crate::syscall;

/// Most descriptors that may arrive before the messages they belong to.
pub const DESCRIPTORS_WAITING_MAX: usize = 64;

const LENGTH_BYTES: usize = 4;
// One receive takes in up to 64 KiB: some hundreds of small requests.
const RECEIVE_BYTES: usize = 64 << 10;

/// A message of the lane, and how many descriptors travel with it.
pub trait LaneMessage: Sized {
    /// What a frame holds. Its parts may stay in it.
    ///
    /// # Errors
    /// It is not this message.
    fn decode_frame(frame: Bytes) -> Result<Self, DecodeError>;

    /// Descriptors that belong to this message.
    fn descriptors(&self) -> usize;
}

impl LaneMessage for LaneRequest {
    fn decode_frame(frame: Bytes) -> Result<Self, DecodeError> {
        Self::decode(frame)
    }

    fn descriptors(&self) -> usize {
        0
    }
}

impl LaneMessage for LaneResponse {
    fn decode_frame(frame: Bytes) -> Result<Self, DecodeError> {
        Self::decode(frame)
    }

    fn descriptors(&self) -> usize {
        match self.result {
            // Data, then fences.
            Some(lane_response::Result::MappedChunk(_)) => 2,
            _ => 0,
        }
    }
}

/// A message and the descriptors that came with it.
#[derive(Debug)]
pub struct Received<M> {
    /// The message.
    pub message: M,
    /// As many as [`LaneMessage::descriptors`] says.
    pub descriptors: Vec<OwnedFd>,
}

/// The receiving half of a connection.
#[derive(Debug)]
pub struct LaneReader<M> {
    stream: Arc<UnixStream>,
    // Where the kernel stores, so that nothing is zeroed on the way.
    scratch: Box<[u8]>,
    buffer: BytesMut,
    descriptors: VecDeque<OwnedFd>,
    kind: PhantomData<fn() -> M>,
}

impl<M: LaneMessage> LaneReader<M> {
    pub(crate) fn new(stream: Arc<UnixStream>) -> Self {
        Self {
            stream,
            scratch: vec![0; RECEIVE_BYTES].into_boxed_slice(),
            buffer: BytesMut::new(),
            descriptors: VecDeque::new(),
            kind: PhantomData,
        }
    }

    /// The same, of messages that are read in another way.
    #[must_use]
    pub fn reading<N: LaneMessage>(self) -> LaneReader<N> {
        let Self { stream, scratch, buffer, descriptors, kind: _ } = self;
        LaneReader { stream, scratch, buffer, descriptors, kind: PhantomData }
    }

    /// The next message; `None` when the peer closed between two messages.
    /// Cancel-safe: nothing that has arrived is lost.
    ///
    /// # Errors
    /// Anything but a clean end. The connection is of no use afterwards.
    pub async fn next(&mut self) -> Result<Option<Received<M>>, LaneError> {
        loop {
            if let Some(received) = self.decode()? {
                return Ok(Some(received));
            }
            let stream = Arc::clone(&self.stream);
            stream.readable().await?;
            match self.receive() {
                Ok(0) if self.buffer.is_empty() => return Ok(None),
                Ok(0) => return Err(LaneError::Truncated),
                Ok(_) => {}
                Err(LaneError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// A message that has arrived in full already, without waiting. With
    /// [`LaneReader::next`] it takes in a whole batch.
    ///
    /// # Errors
    /// As [`LaneReader::next`].
    pub fn next_ready(&mut self) -> Result<Option<Received<M>>, LaneError> {
        self.decode()
    }

    fn receive(&mut self) -> Result<usize, LaneError> {
        let target = &mut self.scratch[..];
        let (room, mut arrived) = (target.len(), None);
        let tried = self.stream.try_io(Interest::READABLE, || {
            let got = syscall::receive(self.stream.as_fd(), target)?;
            // Less than there was room for is all there was, unless it ended at descriptors: the runtime is told so, in
            // place of a second call that would only be told the same. What comes later makes it readable anew.
            let drained = (1..room).contains(&got.bytes) && got.descriptors.is_empty();
            arrived = Some(got);
            if drained { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        let Some(arrived) = arrived else {
            return Err(tried.err().unwrap_or(io::ErrorKind::WouldBlock.into()).into());
        };
        self.buffer.extend_from_slice(&self.scratch[..arrived.bytes]);
        self.descriptors.extend(arrived.descriptors);
        if arrived.cut || self.descriptors.len() > DESCRIPTORS_WAITING_MAX {
            return Err(LaneError::Descriptors { detail: "more of them than this protocol ever sends" });
        }
        Ok(arrived.bytes)
    }

    fn decode(&mut self) -> Result<Option<Received<M>>, LaneError> {
        let Some(prefix) = self.buffer.first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*prefix) as usize;
        if length > MESSAGE_BYTES_MAX {
            return Err(LaneError::FrameTooLong { found: length, limit: MESSAGE_BYTES_MAX });
        }
        if self.buffer.len() < LENGTH_BYTES + length {
            return Ok(None);
        }
        self.buffer.advance(LENGTH_BYTES);
        // Parts of a message that is frozen are parts of it; of one that is not, each would be made so by itself.
        let message = M::decode_frame(self.buffer.split_to(length).freeze())?;
        let wanted = message.descriptors();
        if self.descriptors.len() < wanted {
            return Err(LaneError::Descriptors { detail: "a message came without its descriptors" });
        }
        let descriptors: Vec<OwnedFd> = self.descriptors.drain(..wanted).collect();
        // Descriptors come with the first byte of their message, so with nothing
        // left to decode none may be left over.
        if self.buffer.is_empty() && !self.descriptors.is_empty() {
            return Err(LaneError::Descriptors { detail: "they came with a message that takes none" });
        }
        Ok(Some(Received { message, descriptors }))
    }
}

/// The sending half of a connection.
#[derive(Debug)]
pub struct LaneWriter<M> {
    stream: Arc<UnixStream>,
    buffer: BytesMut,
    // Bytes of the buffer before each set of descriptors.
    marks: VecDeque<(usize, Vec<OwnedFd>)>,
    kind: PhantomData<fn(M)>,
}

impl<M: LaneMessage + Message> LaneWriter<M> {
    pub(crate) fn new(stream: Arc<UnixStream>) -> Self {
        Self { stream, buffer: BytesMut::new(), marks: VecDeque::new(), kind: PhantomData }
    }

    /// Encodes a message behind those that wait already.
    ///
    /// # Errors
    /// A message over the limit; nothing was queued and the connection goes on.
    ///
    /// # Panics
    /// If the number of descriptors is not what the message needs.
    pub fn queue(&mut self, message: &M, descriptors: Vec<OwnedFd>) -> Result<(), LaneError> {
        assert_eq!(descriptors.len(), message.descriptors(), "descriptors do not match the message");
        let length = message.encoded_len();
        let prefix = u32::try_from(length).ok().filter(|_| length <= MESSAGE_BYTES_MAX);
        let Some(prefix) = prefix else {
            return Err(LaneError::MessageTooLong { found: length, limit: MESSAGE_BYTES_MAX });
        };
        if !descriptors.is_empty() {
            self.marks.push_back((self.buffer.len(), descriptors));
        }
        self.buffer.extend_from_slice(&prefix.to_le_bytes());
        message.encode(&mut self.buffer).expect("BytesMut grows as needed");
        Ok(())
    }

    /// As [`LaneWriter::queue`] for a message without descriptors that the caller has encoded himself.
    ///
    /// # Errors
    /// As there.
    pub fn queue_encoded(&mut self, message: &[u8]) -> Result<(), LaneError> {
        let length = message.len();
        let prefix = u32::try_from(length).ok().filter(|_| length <= MESSAGE_BYTES_MAX);
        let Some(prefix) = prefix else {
            return Err(LaneError::MessageTooLong { found: length, limit: MESSAGE_BYTES_MAX });
        };
        self.buffer.extend_from_slice(&prefix.to_le_bytes());
        self.buffer.extend_from_slice(message);
        Ok(())
    }

    /// Bytes that wait to be sent.
    pub fn queued_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Sends what the kernel takes now; true when nothing waits any more.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn try_flush(&mut self) -> Result<bool, LaneError> {
        while !self.buffer.is_empty() {
            let (start, end) = self.next_part();
            let none = Vec::new();
            let descriptors = if start { &self.marks[0].1 } else { &none };
            let part = &self.buffer[..end];
            let sent = self
                .stream
                .try_io(Interest::WRITABLE, || syscall::send(self.stream.as_fd(), part, descriptors));
            match sent {
                Ok(bytes) => self.advance(start, bytes),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Sends everything that waits. Cancel-safe: a later flush goes on where this one stopped.
    ///
    /// # Errors
    /// The connection is broken.
    pub async fn flush(&mut self) -> Result<(), LaneError> {
        while !self.try_flush()? {
            self.stream.writable().await?;
        }
        Ok(())
    }

    /// Ends the connection in both directions at once, whatever still waits.
    /// Readers of both ends see the end of the stream.
    pub fn close(&self) {
        syscall::shut_down(self.stream.as_fd());
    }

    /// Waits for room in the kernel's buffer without borrowing the writer.
    pub fn writable(&self) -> Writable {
        Writable(Arc::clone(&self.stream))
    }

    /// Whether the buffer begins with descriptors, and how many bytes may go with them.
    fn next_part(&self) -> (bool, usize) {
        let starts = self.marks.front().is_some_and(|mark| mark.0 == 0);
        let next = self.marks.iter().map(|mark| mark.0).find(|at| *at > 0);
        (starts, next.unwrap_or(self.buffer.len()))
    }

    fn advance(&mut self, descriptors_sent: bool, bytes: usize) {
        if descriptors_sent && bytes > 0 {
            self.marks.pop_front();
        }
        self.buffer.advance(bytes);
        for mark in &mut self.marks {
            mark.0 -= bytes;
        }
    }
}

/// See [`LaneWriter::writable`].
#[derive(Clone, Debug)]
pub struct Writable(Arc<UnixStream>);

impl Writable {
    /// Returns when a [`LaneWriter::try_flush`] is worth trying. Cancel-safe.
    ///
    /// # Errors
    /// The connection is broken.
    pub async fn ready(&self) -> Result<(), LaneError> {
        Ok(self.0.writable().await?)
    }
}

#[cfg(test)]
mod tests;
