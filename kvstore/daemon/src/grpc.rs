//! The TCP listener: block, admin and signal services, health and reflection.
//!
//! One listener, loopback only. Windows and frames are sized for block bytes;
//! messages, streams and sessions are limited.

mod admin;
mod block;
mod idle;
mod pieces;
mod reading;
mod refusals;
mod verify;
mod watching;
mod writing;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::Listener;
use tokio::net::TcpListener;
use tonic::transport::Server;

use terrace_proto::v1::admin_service_server::AdminServiceServer;
use terrace_proto::v1::block_service_server::BlockServiceServer;
use terrace_proto::v1::signal_service_server::SignalServiceServer;
use terrace_proto::{DESCRIPTORS, MESSAGE_BYTES_MAX};

use crate::connections::{Gate, Gated, Patience};
use crate::lane::{Stop, stopped};
use crate::service::Service;
use crate::signals::Signals;
use crate::status::Status;

/// A Write stream may have this much on the way; more than a link's delay times its rate.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// All streams of one connection together.
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// Largest HTTP/2 frame that the protocol has: fewer frames for the same bytes.
const FRAME_BYTES_MAX: u32 = (1 << 24) - 1;
/// Calls of one connection that are being answered.
const CALLS_PER_CONNECTION: usize = 1024;
/// A peer that is gone without a word is found by this.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Whoever has not said by then that he speaks HTTP/2 is no client.
const GREETING: Duration = Duration::from_secs(10);

/// Serves until `stop`, and then until the running calls have ended.
///
/// # Errors
/// What tonic says; the listener is closed then.
pub(crate) async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    status: Arc<Status>,
    signals: Signals,
    mut stop: Stop,
) -> Result<(), tonic::transport::Error> {
    let most = service.facts().edges.connections;
    let counts = service.metrics().connections("grpc");
    let gate = Gate::new("grpc_listen", most, Patience::Greeting(GREETING), counts);
    let connections = futures_util::stream::unfold(Gated { listener, gate }, async |mut gated| {
        let (connection, _) = gated.accept().await;
        Some((Ok::<_, std::io::Error>(connection), gated))
    });
    let counting = Arc::clone(&service);
    let (health, health_service) = tonic_health::server::health_reporter();
    let blocks = BlockServiceServer::new(block::Blocks::new(service.clone(), stop.clone()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let admin = AdminServiceServer::new(admin::Admin::new(service, status))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let signals = SignalServiceServer::new(signals).max_decoding_message_size(MESSAGE_BYTES_MAX);
    health.set_serving::<BlockServiceServer<block::Blocks>>().await;
    health.set_serving::<AdminServiceServer<admin::Admin>>().await;
    health.set_serving::<SignalServiceServer<Signals>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptor sets were made by our own build");
    let counted = tower::util::MapResponseLayer::new(move |response| refusals::counted(&counting, response));
    Server::builder()
        .layer(counted)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .concurrency_limit_per_connection(CALLS_PER_CONNECTION)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(blocks)
        .add_service(admin)
        .add_service(signals)
        .serve_with_incoming_shutdown(connections, async move {
            stopped(&mut stop).await;
        })
        .await
}

/// Binds a listener, and says what to change when that fails.
///
/// # Errors
/// The address, the configuration key, and what the system said.
pub(crate) async fn bind(address: SocketAddr, key: &'static str) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { address, key, source })
}

/// A listener that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot listen on {address} (configuration key `{key}`): {source}; stop what uses the port, or choose another"
)]
pub struct BindError {
    /// The address.
    pub address: SocketAddr,
    /// The configuration key.
    pub key: &'static str,
    /// What the system said.
    pub source: std::io::Error,
}
