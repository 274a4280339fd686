//! Wire messages of Terrace and their limits. No behaviour.
//!
//! The `.proto` files in this crate are the contract for every engine and tool;
//! the comments in them give units and limits. Convert to core types at the
//! edge, once, in one function that validates.

/// Generated from `proto/terrace/v1/*.proto`.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::missing_errors_doc,
    clippy::too_many_lines,
    reason = "generated code follows prost's style, not ours"
)]
pub mod v1 {
    tonic::include_proto!("terrace.v1");
}

/// Descriptor set of every service, for gRPC server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/terrace.bin"));

/// Longest key in bytes.
pub const KEY_BYTES_MAX: usize = 64;

/// Most blocks in one request: 8,192 blocks of 16 tokens are 131,072 tokens.
pub const BLOCKS_PER_REQUEST_MAX: usize = 8192;

/// Largest message on any connection, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Bytes of a block in one message of a stream, at most, as our own ends send
/// them: few messages, each small enough to be sent while the next is copied.
pub const PIECE_BYTES: usize = 1 << 20;

/// Metadata entry that carries the session's token, in hex.
pub const SESSION_METADATA: &str = "terrace-session";

/// Version of the shared-memory lane's framing.
pub const LANE_VERSION: u32 = 1;
