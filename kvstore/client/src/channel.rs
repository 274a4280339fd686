//! gRPC channels with the windows and deadlines that fit large blocks.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use terrace_proto::MESSAGE_BYTES_MAX;
use terrace_proto::v1::admin_service_client::AdminServiceClient;

use crate::error::ClientError;

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_DEADLINE: Duration = Duration::from_secs(10);
// Several pieces of a stream in flight; the defaults (64 KiB) halve its rate.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
// What comes in one piece: the default (16 KiB) costs each piece of a stream 64 headers and looks.
const FRAME_BYTES_MAX: u32 = 256 << 10;

/// What operators ask; see [`admin`].
pub type Admin = AdminServiceClient<Channel>;

/// A connected gRPC channel to `address`: `http://host:port` or `host:port`.
///
/// # Errors
/// A malformed address, or nobody who answers.
pub async fn channel(address: &str) -> Result<Channel, ClientError> {
    let full = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let endpoint = Endpoint::from_shared(full)
        .map_err(|error| ClientError::BadAddress { address: address.to_owned(), detail: error.to_string() })?
        .connect_timeout(CONNECT_DEADLINE)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_DEADLINE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX);
    endpoint
        .connect()
        .await
        .map_err(|error| ClientError::Unreachable { address: address.to_owned(), detail: innermost(&error) })
}

/// A client of the admin service at `address`.
///
/// # Errors
/// As [`channel`].
pub async fn admin(address: &str) -> Result<Admin, ClientError> {
    let channel = channel(address).await?;
    Ok(AdminServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

/// tonic says only "transport error"; the cause is at the end of the chain.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
