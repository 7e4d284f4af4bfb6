//! `mica storage export`: one store on one socket, in the foreground.

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use mica_storage::store::{Engine, FileStore, FileStoreOptions, Geometry, Store};
use mica_storage::vhost_user::{Event, Export, ExportOptions, QUEUES_MAX, SocketPath, Stats};
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::OutputFormat;

/// What to serve, and how.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A raw disk image or a block device.
    file: PathBuf,

    /// Serve it as a virtio-blk device to the vhost-user clients of this socket.
    #[arg(long, value_name = "SOCKET")]
    vhost_user: PathBuf,

    /// Refuse writes; other readers may have the file, too.
    #[arg(long)]
    read_only: bool,

    /// Go around the host's page cache.
    #[arg(long)]
    direct: bool,

    /// The most queues that a client may use.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)))]
    queues: u16,

    /// The disk's serial number, at most 20 bytes.
    #[arg(long, value_parser = serial, default_value = "")]
    serial: String,
}

fn serial(text: &str) -> Result<String, String> {
    match text.len() <= 20 {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "{} bytes are more than the 20 that fit",
            text.len()
        )),
    }
}

/// Serves until SIGINT or SIGTERM.
pub(crate) fn run(arguments: &Arguments, output: OutputFormat) -> Result<ExitCode, Box<dyn Error>> {
    // Before anything that a signal should clean up.
    let mut signals = signals()?;
    let store = FileStore::open(
        &arguments.file,
        FileStoreOptions {
            read_only: arguments.read_only,
            direct: arguments.direct,
            ..FileStoreOptions::default()
        },
    )?;
    if let Engine::Threads(reason) = store.engine() {
        eprintln!("mica: {reason}; using threads, which is slower");
    }
    let geometry = store.geometry();
    let (_path, listener) = SocketPath::bind(&arguments.vhost_user)?;
    let options = ExportOptions {
        queues: arguments.queues,
        serial: arguments.serial.clone(),
        observer: Some(Arc::new(move |event: &Event| {
            print(output, event_line(event))
        })),
        ..ExportOptions::default()
    };
    let export = Export::listen(Arc::new(store), listener, options)?;
    print(output, ready_line(arguments, &geometry));
    wait(&mut signals)?;
    print(output, stopped_line(&export.stop()));
    Ok(ExitCode::SUCCESS)
}

/// A stream that turns readable with the first signal to stop.
fn signals() -> std::io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM] {
        signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
    }
    Ok(read)
}

fn wait(signals: &mut UnixStream) -> std::io::Result<()> {
    loop {
        match signals.read(&mut [0]) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            result => return result.map(|_| ()),
        }
    }
}

/// A line for people and the same for programs.
type Line = (String, Value);

fn print(output: OutputFormat, (text, value): Line) {
    let line = match output {
        OutputFormat::Text => text,
        OutputFormat::Json => value.to_string(),
    };
    // Nobody has to listen.
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

fn ready_line(arguments: &Arguments, geometry: &Geometry) -> Line {
    let display = |path: &Path| path.display().to_string();
    let (file, socket) = (display(&arguments.file), display(&arguments.vhost_user));
    let access = if geometry.read_only {
        "read-only"
    } else {
        "read-write"
    };
    let bytes = mica_base::units::Bytes(geometry.capacity_bytes);
    let text = format!("{file}: {bytes}, {access}, vhost-user-blk on {socket}");
    let value = json!({
        "event": "ready",
        "file": file,
        "socket": socket,
        "capacity_bytes": geometry.capacity_bytes,
        "block_size": geometry.block_size,
        "read_only": geometry.read_only,
    });
    (text, value)
}

fn event_line(event: &Event) -> Line {
    match event {
        Event::Connected => ("client connected".into(), json!({"event": "connected"})),
        Event::Disconnected { reason: None } => {
            let value = json!({"event": "disconnected"});
            ("client disconnected".into(), value)
        }
        Event::Disconnected {
            reason: Some(reason),
        } => (
            format!("client disconnected: {reason}"),
            json!({"event": "disconnected", "reason": reason}),
        ),
        Event::QueueBroken { queue, reason } => (
            format!("queue {queue} stopped: {reason}"),
            json!({"event": "queue-broken", "queue": queue, "reason": reason}),
        ),
    }
}

fn stopped_line(stats: &Stats) -> Line {
    let text = format!(
        "stopped: {} reads, {} writes, {} flushes, {} discards, {} zeroings, {} errors",
        stats.reads,
        stats.writes,
        stats.flushes,
        stats.discards,
        stats.write_zeroes,
        stats.errors + stats.unsupported + stats.malformed,
    );
    let value = json!({
        "event": "stopped",
        "reads": stats.reads,
        "writes": stats.writes,
        "flushes": stats.flushes,
        "discards": stats.discards,
        "write_zeroes": stats.write_zeroes,
        "bytes_read": stats.bytes_read,
        "bytes_written": stats.bytes_written,
        "errors": stats.errors,
        "unsupported": stats.unsupported,
        "malformed": stats.malformed,
        "resubmitted": stats.resubmitted,
        "connections": stats.connections,
    });
    (text, value)
}
