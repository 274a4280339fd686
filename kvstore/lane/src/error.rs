//! What can go wrong on the socket and with a mapping.

use std::io;
use std::path::PathBuf;

/// Why the connection cannot go on, or could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// A path that no socket address can hold.
    #[error(
        "lane socket path {path} has {found} bytes; the limit is {limit}; choose a shorter directory",
        path = path.display()
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        found: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// Another process serves this socket.
    #[error(
        "another process answers on lane socket {path}; stop it or choose another path",
        path = path.display()
    )]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something that is no socket lies where the socket should be.
    #[error("{path} exists and is no socket; move it away or choose another path", path = path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A system call on the socket failed.
    #[error("lane socket {path}: {source}", path = path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A frame longer than the protocol allows was announced.
    #[error("the peer announced a frame of {found} bytes; the limit is {limit}")]
    FrameTooLong {
        /// Announced length.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// A message of ours is longer than the protocol allows. Nothing was sent.
    #[error("a message of {found} bytes cannot be sent; the limit is {limit}; ask for fewer blocks at once")]
    MessageTooLong {
        /// Its length.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// A frame that is no message of this protocol.
    #[error("the peer sent a frame that is no message of this protocol: {0}")]
    Garbage(#[from] prost::DecodeError),
    /// Descriptors that no message asked for, or fewer than a message needs.
    #[error("descriptors on the lane do not match its messages: {detail}")]
    Descriptors {
        /// What was wrong.
        detail: &'static str,
    },
    /// The peer went away in the middle of a frame.
    #[error("the peer closed the lane in the middle of a frame")]
    Truncated,
    /// The connection failed.
    #[error("lane connection: {0}")]
    Io(#[from] io::Error),
}

/// Why a chunk could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The descriptor holds less memory than was announced: touching the rest would kill us.
    #[error("{what} of the chunk has {found} bytes where {announced} were announced")]
    TooSmall {
        /// "data" or "fences".
        what: &'static str,
        /// Announced length in bytes.
        announced: u64,
        /// Length of the file behind the descriptor.
        found: u64,
    },
    /// The peer could still shrink the memory: touching it could kill us.
    #[error("{what} of the chunk is not sealed against shrinking; refusing to map it")]
    NotSealed {
        /// "data" or "fences".
        what: &'static str,
    },
    /// A length that is zero or does not fit this machine.
    #[error("a chunk of {announced} bytes cannot be mapped")]
    BadLength {
        /// The length.
        announced: u64,
    },
    /// The kernel refused.
    #[error("mapping {what} of the chunk: {source}")]
    Kernel {
        /// "data" or "fences".
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
}
