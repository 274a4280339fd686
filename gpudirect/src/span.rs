//! What a copy goes between: parts of chunks and of host memory, checked once
//! when they are named.

use std::sync::Arc;

use terrace_core::ByteCount;

use crate::device::Chunk;
use crate::error::DeviceError;
use crate::host_bytes::{HostBytes, range};

/// Bytes of a chunk. Keeps the chunk.
#[derive(Clone, Debug)]
pub struct DeviceBytes {
    chunk: Arc<Chunk>,
    offset: u64,
    bytes: ByteCount,
}

impl DeviceBytes {
    /// A part of a chunk.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`].
    pub fn new(chunk: Arc<Chunk>, offset: u64, bytes: ByteCount) -> Result<Self, DeviceError> {
        range(chunk.bytes().get(), offset, bytes.get())?;
        Ok(Self { chunk, offset, bytes })
    }

    /// The chunk that it is part of.
    pub fn chunk(&self) -> &Arc<Chunk> {
        &self.chunk
    }

    /// First byte, from the start of the chunk.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length.
    pub fn bytes(&self) -> ByteCount {
        self.bytes
    }

    /// Where the device finds the first byte.
    pub fn address(&self) -> u64 {
        self.chunk.address() + self.offset
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`].
    pub fn part(&self, offset: u64, bytes: ByteCount) -> Result<Self, DeviceError> {
        range(self.bytes.get(), offset, bytes.get())?;
        Ok(Self { chunk: Arc::clone(&self.chunk), offset: self.offset + offset, bytes })
    }
}

/// One end of a copy.
#[derive(Clone, Debug)]
pub enum Span {
    /// In host memory.
    Host(HostBytes),
    /// On a device.
    Device(DeviceBytes),
}

impl Span {
    /// Length.
    pub fn bytes(&self) -> ByteCount {
        match self {
            Self::Host(host) => ByteCount::new(host.len() as u64),
            Self::Device(device) => device.bytes,
        }
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`].
    pub fn part(&self, offset: u64, bytes: ByteCount) -> Result<Self, DeviceError> {
        match self {
            Self::Host(host) => host.part(offset, bytes).map(Self::Host),
            Self::Device(device) => device.part(offset, bytes).map(Self::Device),
        }
    }
}

/// Which way a copy goes. Each has streams of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// Promotion.
    HostToDevice,
    /// Demotion.
    DeviceToHost,
    /// Within one device.
    DeviceToDevice,
    /// From one device to another.
    PeerToPeer,
}

impl Direction {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::HostToDevice, Self::DeviceToHost, Self::DeviceToDevice, Self::PeerToPeer];

    /// For metrics and benchmarks.
    pub const fn label(self) -> &'static str {
        match self {
            Self::HostToDevice => "host_to_device",
            Self::DeviceToHost => "device_to_host",
            Self::DeviceToDevice => "device_to_device",
            Self::PeerToPeer => "peer_to_peer",
        }
    }
}

/// One copy. Both ends have one length, and at least one is on a device.
#[derive(Clone, Debug)]
pub struct Piece {
    source: Span,
    target: Span,
    direction: Direction,
}

impl Piece {
    /// A copy of all of `source` to all of `target`.
    ///
    /// # Errors
    /// [`DeviceError::BadJob`] for unequal lengths, none at all, or two ends in host memory.
    pub fn new(source: Span, target: Span) -> Result<Self, DeviceError> {
        if source.bytes() != target.bytes() {
            return Err(DeviceError::BadJob { detail: "source and target differ in length" });
        }
        if source.bytes().get() == 0 {
            return Err(DeviceError::BadJob { detail: "a copy of nothing" });
        }
        let direction = match (&source, &target) {
            (Span::Host(_), Span::Device(_)) => Direction::HostToDevice,
            (Span::Device(_), Span::Host(_)) => Direction::DeviceToHost,
            (Span::Device(from), Span::Device(to)) if from.chunk.device() == to.chunk.device() => {
                Direction::DeviceToDevice
            }
            (Span::Device(_), Span::Device(_)) => Direction::PeerToPeer,
            (Span::Host(_), Span::Host(_)) => {
                return Err(DeviceError::BadJob { detail: "neither end is on a device" });
            }
        };
        Ok(Self { source, target, direction })
    }

    /// From here.
    pub fn source(&self) -> &Span {
        &self.source
    }

    /// To here.
    pub fn target(&self) -> &Span {
        &self.target
    }

    /// Which way.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Length.
    pub fn bytes(&self) -> ByteCount {
        self.source.bytes()
    }

    /// The host end, if there is one.
    pub fn host(&self) -> Option<&HostBytes> {
        match (&self.source, &self.target) {
            (Span::Host(host), _) | (_, Span::Host(host)) => Some(host),
            (Span::Device(_), Span::Device(_)) => None,
        }
    }

    /// The same part of both ends.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`].
    pub fn part(&self, offset: u64, bytes: ByteCount) -> Result<Self, DeviceError> {
        Ok(Self {
            source: self.source.part(offset, bytes)?,
            target: self.target.part(offset, bytes)?,
            direction: self.direction,
        })
    }
}
