package gemma.core

import java.io.IOException
import java.io.InputStream
import java.net.HttpURLConnection
import java.net.MalformedURLException
import java.net.URL

/** An answer of a server; its body is read inside of `Https.get`. */
internal class HttpAnswer(val status: Int, val host: String, val commit: String?, private val connection: HttpURLConnection) {
    val bytes: Long get() = connection.contentLengthLong // negative if not told

    /** A strong one, which names these very bytes; null if there is none. */
    val etag: String? get() = header("ETag")?.takeIf { it.startsWith('"') }

    val body: InputStream get() = connection.inputStream

    fun header(name: String): String? = connection.getHeaderField(name)
}

/**
 * Requests files over HTTPS. Redirects may lead to other hosts, but never to plain HTTP. Requests name the app and tell
 * nothing else: no account, no cookie, no model of the phone.
 */
internal class Https(
    private val connect: (URL) -> HttpURLConnection,
    private val timeoutMs: Int,
    private val plainHosts: Set<String>, // hosts for which http is allowed
) {
    @Volatile
    private var current: HttpURLConnection? = null

    /** Throws IOException if the connection fails, DownloadException if a redirect is refused. */
    fun <T> get(address: String, headers: Map<String, String>, read: (HttpAnswer) -> T): T {
        var url = checked(address)
        var commit: String? = null
        for (hop in 0..MAX_REDIRECTS) {
            val connection = open(url, headers)
            try {
                val status = connection.responseCode
                commit = commit ?: connection.getHeaderField("X-Repo-Commit")
                if (status !in REDIRECTS) return read(HttpAnswer(status, url.host, commit, connection))
                val target = connection.getHeaderField("Location") ?: throw DownloadException("${url.host} redirects to nowhere; try again later")
                url = checked(target, url)
            } finally {
                connection.disconnect()
            }
        }
        throw DownloadException("${url.host} redirects more than $MAX_REDIRECTS times; try again later")
    }

    /** Ends the running request, from any thread. */
    fun stop() {
        current?.disconnect()
    }

    private fun open(url: URL, headers: Map<String, String>): HttpURLConnection {
        val connection = connect(url)
        current = connection
        connection.instanceFollowRedirects = false
        connection.useCaches = false
        connection.connectTimeout = timeoutMs
        connection.readTimeout = timeoutMs
        connection.setRequestProperty("User-Agent", "gemma-demo")
        connection.setRequestProperty("Accept-Encoding", "identity") // ranges and sizes count the file's own bytes
        headers.forEach(connection::setRequestProperty)
        return connection
    }

    private fun checked(address: String, from: URL? = null): URL {
        val url = try {
            URL(from, address)
        } catch (error: MalformedURLException) {
            throw DownloadException("${from?.host} redirects to \"${address.take(80)}\", which is not an address; try again later", error)
        }
        val allowed = url.protocol == "https" || url.protocol == "http" && url.host in plainHosts
        if (!allowed) throw DownloadException("${from?.host ?: url.host} leads to ${url.protocol}://${url.host}, which is not encrypted; nothing was downloaded from there")
        return url
    }

    private companion object {
        const val MAX_REDIRECTS = 10
        val REDIRECTS = setOf(301, 302, 303, 307, 308)
    }
}

/** A connection that ended before the file did; the download goes on with another one. */
internal class CutException(message: String) : IOException(message)
