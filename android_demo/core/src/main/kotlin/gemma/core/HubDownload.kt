package gemma.core

import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.net.HttpURLConnection
import java.net.URL
import java.security.MessageDigest
import java.util.concurrent.CancellationException
import java.util.concurrent.CountDownLatch
import java.util.concurrent.TimeUnit

data class DownloadProgress(val doneBytes: Long, val totalBytes: Long)

const val HUB = "https://huggingface.co"

/**
 * One download of a bundle from the hub into the library: the manifest, then the files that it lists, all of one commit.
 *
 * What has arrived stays after an error and after `stop`, and the next download of the same address goes on from there.
 * The bundle appears in the library only when all of its files have the manifest's digests.
 */
class HubDownload(
    private val library: BundleLibrary,
    connect: (URL) -> HttpURLConnection = { it.openConnection() as HttpURLConnection },
    private val origin: String = HUB,
    plainHosts: Set<String> = emptySet(), // for tests: hosts that may be asked over http
    timeoutMs: Int = 20_000,
    private val pauseMs: Long = 1000, // before a cut connection is opened again; doubles each time
) {
    private val https = Https(connect, timeoutMs, plainHosts)
    private val stopped = CountDownLatch(1)
    private var done = 0L
    private var total = 0L
    private var onProgress: (DownloadProgress) -> Unit = {}

    /** Ends `run` with a CancellationException; call it from any thread but Android's main thread. */
    fun stop() {
        stopped.countDown()
        https.stop()
    }

    /**
     * Returns the bundle's folder. Throws DownloadException, BundleException and StorageException, each with what to do.
     * If `onProgress` throws, the download ends as after `stop`.
     */
    fun run(address: HubAddress, checked: CheckedBundles? = null, onProgress: (DownloadProgress) -> Unit = {}): File {
        this.onProgress = onProgress
        val stage = library.stage(address)
        try {
            stage.begin(address)
            val commit = fetchManifest(address, stage)
            val manifest = readManifestOf(stage)
            total = manifest.files.values.sumOf { it.bytes }
            checkRoom(stage, total)
            for ((name, file) in manifest.files) {
                if (!stage.holds(name, file, ::count)) fetchFile(address.url(origin, commit, name), name, file, stage)
            }
            stage.keepOnly(manifest)
            presentBundle(stage.files)
            return library.admit(stage.files, address.name, checked).also { stage.delete() }
        } catch (error: IOException) {
            checkStopped()
            throw StorageException("the download can't be kept: ${error.message}; free some storage", error)
        }
    }

    /** Writes the manifest; returns the commit that it is of, or the revision where the server doesn't tell. */
    private fun fetchManifest(address: HubAddress, stage: DownloadStage): String {
        val revision = address.revision ?: "main"
        return attempts { _ ->
            https.get(address.url(origin, revision, MANIFEST), emptyMap()) { answer ->
                refuse(answer, if (answer.status == 404) "$address, or its manifest.json," else "$address")
                val text = answer.body.readBytesUpTo(MANIFEST_LIMIT) ?: throw DownloadException("the manifest of $address has more than $MANIFEST_LIMIT bytes; it is not a bundle")
                if (answer.bytes > text.size) throw CutException("the connection was cut")
                replaceText(File(stage.files, MANIFEST), String(text, Charsets.UTF_8))
                answer.commit?.takeIf(COMMIT::matches) ?: revision
            }
        }
    }

    private fun fetchFile(url: String, name: String, file: BundleFile, stage: DownloadStage) {
        val before = done
        val digest = attempts { attempt ->
            done = before
            val known = stage.partial(file)
            if (known == null) stage.dropPart()
            val arrived = stage.digestOfPart(::count)
            if (known != null && stage.part.length() == file.bytes) return@attempts hex(arrived) // ended before it was checked
            val headers = known?.let { mapOf("Range" to "bytes=${stage.part.length()}-", "If-Range" to it.etag) }
            https.get(url, headers ?: emptyMap()) { answer ->
                if (answer.status == RANGE_REFUSED) stage.dropPart()
                if (answer.status == RANGE_REFUSED) throw CutException("${answer.host} doesn't go on with $name")
                refuse(answer, name)
                val goesOn = answer.status == PARTIAL
                if (goesOn) checkRange(answer, name, file, stage, known) else stage.startPart(file, answer.etag)
                if (!goesOn) done = before
                receive(answer, name, file, stage, if (goesOn) arrived else MessageDigest.getInstance("SHA-256"), attempt)
            }
        }
        if (digest != file.sha256) {
            stage.dropPart()
            throw DownloadException("$name arrived altered: its sha256 is ${digest.take(12)}…, the manifest says ${file.sha256.take(12)}…; try again")
        }
        stage.finishPart(name)
    }

    /** Appends an answer to the part; returns the whole file's digest, given that of what was there. */
    private fun receive(answer: HttpAnswer, name: String, file: BundleFile, stage: DownloadStage, digest: MessageDigest, attempt: Attempt): String {
        var length = stage.part.length()
        if (answer.bytes >= 0 && length + answer.bytes != file.bytes) throw wrongSize(name, "${length + answer.bytes}", file, stage)
        FileOutputStream(stage.part, true).use { out ->
            readBlocks(answer.body) { block, count ->
                length += count
                if (length > file.bytes) throw wrongSize(name, "more", file, stage)
                keep(out, block, count)
                digest.update(block, 0, count)
                attempt.hasProgressed = true
                count(count)
            }
        }
        if (length < file.bytes) throw CutException("the connection to ${answer.host} was cut")
        return hex(digest)
    }

    private fun keep(out: FileOutputStream, block: ByteArray, count: Int) = try {
        out.write(block, 0, count)
    } catch (error: IOException) {
        throw StorageException("the download can't be kept: ${error.message}; free some storage", error)
    }

    private fun wrongSize(name: String, bytes: String, file: BundleFile, stage: DownloadStage): DownloadException {
        stage.dropPart()
        return DownloadException("$name has $bytes bytes, the manifest says ${file.bytes}; the repository is damaged, don't use it")
    }

    private fun checkRange(answer: HttpAnswer, name: String, file: BundleFile, stage: DownloadStage, known: PartialFile?) {
        val range = answer.header("Content-Range").orEmpty()
        val right = range == "bytes ${stage.part.length()}-${file.bytes - 1}/${file.bytes}"
        if (known != null && right && (answer.etag ?: known.etag) == known.etag) return
        stage.dropPart()
        throw CutException("${answer.host} sent another part of $name than was asked for")
    }

    private class Attempt(var hasProgressed: Boolean = false)

    /** Tries again after cut connections, until several in a row have brought nothing. */
    private fun <T> attempts(work: (Attempt) -> T): T {
        var failures = 0
        while (true) {
            checkStopped()
            val attempt = Attempt()
            try {
                return work(attempt)
            } catch (error: IOException) {
                checkStopped()
                failures = if (attempt.hasProgressed) 1 else failures + 1
                if (failures == MAX_FAILURES) throw DownloadException("the download was interrupted: ${error.message}; what has arrived is kept, try again", error)
                stopped.await(pauseMs shl (failures - 1), TimeUnit.MILLISECONDS)
            }
        }
    }

    private fun refuse(answer: HttpAnswer, what: String) {
        val problem = when (answer.status) {
            200, PARTIAL -> if (answer.header("Content-Encoding") in listOf(null, "identity")) return else "sends $what compressed; try again later"
            401, 403 -> "refuses $what: it is private or gated, or doesn't exist; the app has no account there, so copy the bundle by hand"
            404 -> "does not have $what; check the address, OWNER/NAME of a bundle that gemma-export push wrote"
            429, in 500..599 -> throw CutException("${answer.host} answers ${answer.status}")
            else -> "answers ${answer.status} for $what; try again later"
        }
        throw DownloadException("${answer.host} $problem")
    }

    private fun readManifestOf(stage: DownloadStage): Manifest {
        val manifest = manifestOf(stage.files)
        manifest.files.forEach { (name, file) -> checkName(name, file) }
        if (manifest.files.size > MAX_FILES) throw DownloadException("the manifest lists more than $MAX_FILES files, so it is not a bundle")
        if (manifest.files.keys.map { it.lowercase() }.toSet().size < manifest.files.size) {
            throw DownloadException("the manifest has two names that differ only in case, which some storage takes for one; don't use it")
        }
        return manifest
    }

    private fun checkName(name: String, file: BundleFile) {
        val safe = staysInside(name) && isShort(name) && !name.equals(MANIFEST, ignoreCase = true) && file.bytes >= 0
        if (!safe) throw DownloadException("the manifest names \"${name.take(80)}\", which is not a file inside of a bundle; don't use it")
    }

    private fun checkRoom(stage: DownloadStage, needed: Long) {
        val missing = needed - stage.bytes
        val room = library.room
        if (missing > room) {
            throw DownloadException("%.2f GB are still to be downloaded, and %.2f GB are free; delete other bundles".format(missing / 1e9, maxOf(0, room) / 1e9))
        }
    }

    private fun count(bytes: Int) {
        checkStopped()
        done += bytes
        onProgress(DownloadProgress(done, total))
    }

    private fun checkStopped() {
        if (stopped.count == 0L) throw CancellationException("the download was stopped")
    }

    private companion object {
        const val PARTIAL = 206
        const val RANGE_REFUSED = 416
        const val MAX_FAILURES = 5
        const val MANIFEST_LIMIT = 16 shl 20
        val COMMIT = Regex("[0-9a-f]{40}")
    }
}
