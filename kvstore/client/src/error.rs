//! What a caller can act on. Misses, throttled blocks and seals that lost a race
//! are outcomes, not errors.

use std::time::Duration;

use tonic::{Code, Status};

use terrace_gpudirect::DeviceError;
use terrace_lane::{LaneError, MapError};
use terrace_proto::v1::LaneError as Refusal;

use crate::read::BadBlock;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The target names neither a socket nor an address.
    #[error("no daemon was named; give the path of its lane socket or its gRPC address")]
    NoTarget,
    /// An address that is none.
    #[error("`{address}` is no address of a daemon: {detail}; write for example http://127.0.0.1:7070")]
    BadAddress {
        /// What was given.
        address: String,
        /// What is wrong with it.
        detail: String,
    },
    /// Nobody answers there.
    #[error("no daemon answers at {address}: {detail}; is terraced running?")]
    Unreachable {
        /// Socket path or gRPC address.
        address: String,
        /// What the kernel or the transport said.
        detail: String,
    },
    /// The session has ended: the daemon went away or closed it. Open a new one.
    #[error("the session has ended; open a new one and lease again")]
    Disconnected,
    /// The system gave no random number.
    #[error("the system gives no random numbers: {detail}")]
    NoRandom {
        /// What it said.
        detail: String,
    },
    /// The daemon is there and does not answer. What was asked may still be done.
    #[error("no answer from the daemon within {waited:?}; is it stopped or overloaded?")]
    NoAnswer {
        /// How long was waited.
        waited: Duration,
    },
    /// The daemon refused the request; nothing was changed.
    #[error("refused ({code:?}): {message}")]
    Refused {
        /// Kind of refusal.
        code: Code,
        /// What was wrong and what to do.
        message: String,
    },
    /// The daemon is over a limit; back off and ask again.
    #[error("throttled: {message}; wait a little and ask again")]
    Throttled {
        /// Which limit.
        message: String,
    },
    /// This call hands out mapped memory.
    #[error("`{call}` needs the daemon's local socket; connect with one, or use `read` and `write`")]
    NeedsLane {
        /// The call.
        call: &'static str,
    },
    /// This call streams over gRPC.
    #[error("`{call}` needs the daemon's gRPC address; name it in the target")]
    NeedsGrpc {
        /// The call.
        call: &'static str,
    },
    /// A space that another session opened.
    #[error("this space was opened by another session; open it in this one")]
    ForeignSpace,
    /// A bundle of no spaces.
    #[error("no space was named; a bundle has at least one")]
    EmptyBundle,
    /// A key that is empty or too long.
    #[error("key {index} has {found} bytes; a key has 1 to {limit}")]
    BadKey {
        /// Its position.
        index: usize,
        /// Its length in bytes.
        found: usize,
        /// Longest key in bytes.
        limit: usize,
    },
    /// More blocks than one request may name.
    #[error("{found} blocks in one request; the limit is {limit}; split the request")]
    TooManyBlocks {
        /// Blocks in the request.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// Keys and payloads that do not pair up.
    #[error("{keys} keys and {payloads} payloads; each key needs one payload")]
    Unpaired {
        /// Keys.
        keys: usize,
        /// Payloads.
        payloads: usize,
    },
    /// A payload that is not one block long.
    #[error("payload {index} has {found} bytes; this space's blocks have {expected}")]
    WrongLength {
        /// Its position.
        index: usize,
        /// Its length in bytes.
        found: u64,
        /// The space's block length in bytes.
        expected: u64,
    },
    /// A position whose block was not granted, or was sealed or aborted before.
    #[error("block {index} of this lease cannot be written: not granted, or sealed or aborted before")]
    NotWritable {
        /// The position.
        index: u32,
    },
    /// A chunk could not be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A device of the daemon that this session was not given.
    #[error("device {device} of the daemon is not known here; give it to the session by `add_device`")]
    UnknownDevice {
        /// The daemon's number.
        device: u32,
    },
    /// A device that is none of the daemon's.
    #[error("the daemon owns no memory of this device ({name}); name it in its configuration, or do without")]
    OtherDevice {
        /// What the driver calls it.
        name: String,
    },
    /// What a device says.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A block on a device that is not what was granted.
    #[error(transparent)]
    Block(#[from] BadBlock),
    /// A request that cannot be encoded.
    #[error(transparent)]
    Lane(LaneError),
    /// The daemon answered something that the protocol does not allow.
    #[error("the daemon's answer breaks the protocol: {detail}; are client and daemon of one version?")]
    Protocol {
        /// What was wrong.
        detail: &'static str,
    },
}

impl ClientError {
    /// Whether a new session, or the same call a little later, may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Disconnected
            | Self::Unreachable { .. }
            | Self::Throttled { .. }
            | Self::NoAnswer { .. } => true,
            Self::Refused { code, .. } => *code == Code::Unavailable,
            Self::NoTarget
            | Self::NoRandom { .. }
            | Self::BadAddress { .. }
            | Self::NeedsLane { .. }
            | Self::NeedsGrpc { .. }
            | Self::ForeignSpace
            | Self::EmptyBundle
            | Self::BadKey { .. }
            | Self::TooManyBlocks { .. }
            | Self::Unpaired { .. }
            | Self::WrongLength { .. }
            | Self::NotWritable { .. }
            | Self::Map(_)
            | Self::UnknownDevice { .. }
            | Self::OtherDevice { .. }
            | Self::Device(_)
            | Self::Block(_)
            | Self::Lane(_)
            | Self::Protocol { .. } => false,
        }
    }

    /// From a refusal on the lane.
    pub(crate) fn refused(error: Refusal) -> Self {
        let code = i32::try_from(error.code).map_or(Code::Unknown, Code::from_i32);
        Self::from_code(code, error.message)
    }

    /// Of a hello. A daemon of another version says which one it speaks, if anything; which one is spoken here, and what
    /// to do, is added.
    pub(crate) fn at_hello(self, spoken: &str) -> Self {
        match self {
            Self::Refused { code: code @ (Code::FailedPrecondition | Code::Unimplemented), message } => {
                let advice = "use a client and a terraced of one release";
                Self::Refused { code, message: format!("{message}; this client speaks {spoken}: {advice}") }
            }
            other => other,
        }
    }

    fn from_code(code: Code, message: String) -> Self {
        match code {
            Code::ResourceExhausted => Self::Throttled { message },
            _ => Self::Refused { code, message },
        }
    }
}

impl From<LaneError> for ClientError {
    fn from(error: LaneError) -> Self {
        match error {
            LaneError::MessageTooLong { .. }
            | LaneError::PathTooLong { .. }
            | LaneError::InUse { .. }
            | LaneError::NotASocket { .. } => Self::Lane(error),
            LaneError::Socket { path, source } => {
                Self::Unreachable { address: path.display().to_string(), detail: source.to_string() }
            }
            LaneError::FrameTooLong { .. } => Self::Protocol { detail: "a frame over the limit" },
            LaneError::Garbage(_) => Self::Protocol { detail: "a frame that is no message" },
            LaneError::Descriptors { .. } => {
                Self::Protocol { detail: "descriptors that do not match the message" }
            }
            LaneError::Truncated | LaneError::Io(_) => Self::Disconnected,
        }
    }
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        Self::from_code(status.code(), status.message().to_owned())
    }
}
