import createClient from "openapi-fetch";
declare const process: { argv: string[] };
import type { paths } from "./schema.js";
const [base, key, image, encoder] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl: base, headers: key ? { authorization: `Bearer ${key}` } : {} });
function need<T>(found: { data?: T; error?: unknown }): T {
  if (found.data === undefined) throw new Error(JSON.stringify(found.error));
  return found.data;
}
const inputs = [{ image_b64: image }];
const made = need(await client.PUT("/v1/galleries/{gallery}", { params: { path: { gallery: "typescript" } } }));
const embedded = need(await client.POST("/v1/embed", { body: { inputs, aligned: true, encoding: "b64_f16", faces: "largest" } }));
const embedding = embedded.data[0].embedding;
const enrolled = need(await client.POST("/v1/galleries/{gallery}/subjects/{subject}/templates", {
  params: { path: { gallery: made.name, subject: "ann" } }, body: { inputs, aligned: true },
}));
const found = need(await client.POST("/v1/galleries/{gallery}/identify", {
  params: { path: { gallery: made.name } }, body: { query: { embedding, encoding: "b64_f16", encoder }, top_k: 1 },
}));
const refused = await client.GET("/v1/galleries/{gallery}", { params: { path: { gallery: "nobody" } } });
console.log(JSON.stringify({ sequence: enrolled.sequence, decision: found.decision, subject: found.candidates[0]?.subject, refused: (refused.error as { type?: string } | undefined)?.type }));
