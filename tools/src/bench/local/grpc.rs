//! `Read` over gRPC against a bare tonic stream of equal messages, each from a process of its own.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::task::{Context as Wakeable, Poll};
use std::time::Instant;

use anyhow::{Context, ensure};
use bytes::Bytes;
use terrace_client::{GetOptions, Session, Target, Transport, channel, wire};
use terrace_planner::process::guarded;
use terrace_proto::v1::block_service_client::BlockServiceClient;
use terrace_proto::{MESSAGE_BYTES_MAX, PIECE_BYTES};
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{Grpc, NamedService, ServerStreamingService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::{ROUNDS, put_batch};
use crate::bench::{Line, blocks, median, stand};
use crate::up::ports;

const BLOCK_BYTES: u64 = 2 << 20;
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
const FRAME_BYTES_MAX: u32 = (1 << 24) - 1;
const BLOCKS: usize = 32;
const BAR: f64 = 0.5;

pub(super) async fn run(daemon: &stand::Daemon) -> anyhow::Result<Vec<Line>> {
    let lane = blocks::session(&daemon.socket).await?;
    let keys = blocks::keys(1 << 30, BLOCKS);
    let payload = vec![9; usize::try_from(BLOCK_BYTES)?];
    let payloads = keys.iter().map(|_| &payload[..]);
    put_batch(&lane, &blocks::space(&lane, BLOCK_BYTES).await?, &keys, None, payloads).await?;

    let target = Target { grpc: Some(daemon.grpc.clone()), ..Target::default() };
    let session = Session::connect(&target).await?;
    ensure!(session.transport() == Transport::Grpc, "not over gRPC");
    let space = blocks::space(&session, BLOCK_BYTES).await?;
    let bare = Bare::start()?;
    let mut stream =
        BlockServiceClient::new(channel(&bare.address).await?).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let gib = (BLOCKS as u64 * BLOCK_BYTES) as f64 / f64::from(1 << 30);
    let mut memory = vec![0; BLOCKS * payload.len()];
    let (mut ours, mut limit) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        memory.fill(1);
        let mut targets: Vec<_> = memory.chunks_exact_mut(payload.len()).collect();
        let began = Instant::now();
        let found = session
            .get(&space, &keys, &mut targets, GetOptions { wait: super::WAIT, ..GetOptions::default() })
            .await?;
        ours.push(gib / began.elapsed().as_secs_f64());
        ensure!(found.iter().all(|found| found.granted().is_some()), "not there: {found:?}");
        ensure!(targets.iter().all(|block| *block == &payload[..]), "other bytes than were put");

        let began = Instant::now();
        let mut pieces = stream.read(wire::ReadRequest::default()).await?.into_inner();
        let mut bytes = 0;
        while let Some(piece) = pieces.message().await? {
            bytes += piece.data.len() as u64;
        }
        limit.push(gib / began.elapsed().as_secs_f64());
        ensure!(bytes == BLOCKS as u64 * BLOCK_BYTES, "the bare stream ended early");
    }
    let name = format!("local_{BLOCK_BYTES}_grpc_read");
    Ok(vec![Line::part_of(&name, median(&ours), median(&limit), BAR, "GiB/s")])
}

/// The process that streams.
struct Bare {
    process: Child,
    address: String,
}

impl Bare {
    fn start() -> anyhow::Result<Self> {
        let mut command = guarded(&std::env::current_exe()?);
        command.args(["bench", "local-bare-grpc"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = command.spawn().context("cannot start the bare stream")?;
        let stdout = process.stdout.take().context("a piped stdout is there")?;
        let mut address = String::new();
        BufReader::new(stdout).read_line(&mut address)?;
        Ok(Self { process, address: format!("http://{}", address.trim()) })
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // It is gone already, or goes now.
        self.process.kill().and_then(|()| self.process.wait()).map(|_| ()).unwrap_or_default();
    }
}

/// Serves the bare stream until killed.
pub(crate) async fn serve_bare() -> anyhow::Result<()> {
    let [address] = ports::free()?;
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("{address}");
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let service = Stream { piece: vec![9; PIECE_BYTES].into() };
    tonic::transport::Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .add_service(service)
        .serve_with_incoming(incoming)
        .await?;
    Ok(())
}

/// Answers every call with the same pieces.
#[derive(Clone)]
struct Stream {
    piece: Bytes,
}

impl NamedService for Stream {
    const NAME: &'static str = "terrace.v1.BlockService";
}

impl Service<http::Request<tonic::body::Body>> for Stream {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Wakeable<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            let codec = ProstCodec::<wire::ReadResponse, wire::ReadRequest>::default();
            let mut grpc = Grpc::new(codec).max_encoding_message_size(MESSAGE_BYTES_MAX);
            Ok(grpc.server_streaming(service, request).await)
        })
    }
}

type Pieces = Box<dyn Iterator<Item = Result<wire::ReadResponse, Status>> + Send>;

impl ServerStreamingService<wire::ReadRequest> for Stream {
    type Response = wire::ReadResponse;
    type ResponseStream = tokio_stream::Iter<Pieces>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, _: Request<wire::ReadRequest>) -> Self::Future {
        let whole = wire::ReadResponse {
            length: BLOCK_BYTES,
            checksum: u64::MAX,
            block_id: vec![7; 16].into(),
            data: self.piece.clone(),
            ..wire::ReadResponse::default()
        };
        let pieces = BLOCKS * usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX) / PIECE_BYTES;
        let pieces: Pieces = Box::new((0..pieces).map(move |_| Ok(whole.clone())));
        ready(Ok(Response::new(tokio_stream::iter(pieces))))
    }
}
